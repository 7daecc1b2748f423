# Every package with its version, one a line.
if command -v dpkg-query >/dev/null; then
    dpkg-query -W -f '${Package} ${Version} ${Architecture}\n'
elif command -v rpm >/dev/null; then
    rpm -qa --qf '%{NAME} %{EPOCHNUM}:%{VERSION}-%{RELEASE} %{ARCH}\n' | sort
elif command -v apk >/dev/null; then
    apk list --installed 2>/dev/null
fi
