; The smallest guest that shows whether an accelerator works: a boot sector that sets up paging, enters long mode and
; ends QEMU through isa-debug-exit. An accelerator that opens but can't run guests never gets there.
; Made with: nasm -f bin -o canary.bin canary.asm
bits 16
org 0x7c00
    cli
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    ; One 2 MiB page, mapped to itself: tables at 0x1000, 0x2000, 0x3000.
    mov edi, 0x1000
    mov cr3, edi
    xor eax, eax
    mov ecx, 3072
    rep stosd
    mov dword [0x1000], 0x2003
    mov dword [0x2000], 0x3003
    mov dword [0x3000], 0x83
    mov eax, cr4
    or eax, 1 << 5              ; physical address extension
    mov cr4, eax
    mov ecx, 0xC0000080         ; EFER: long mode enable
    rdmsr
    or eax, 1 << 8
    wrmsr
    lgdt [table]
    mov eax, cr0
    or eax, 0x80000001          ; paging and protection
    mov cr0, eax
    jmp 8:long_mode
bits 64
long_mode:
    mov al, 0x2a                ; isa-debug-exit makes this the status 2 * 0x2a + 1 = 85
    out 0xf4, al
halt:
    hlt
    jmp halt
align 8
descriptors:
    dq 0
    dq 0x00209A0000000000       ; 64-bit code
table:
    dw 15
    dd descriptors
times 510 - ($ - $$) db 0
dw 0xaa55
