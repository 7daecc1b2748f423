#!/bin/sh
# nginx with one site, conf.d/kiln.conf, in place of the distribution's own.
set -eu
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. ./lib.sh

port=$KILN_INPUT_PORT
server_name=$KILN_INPUT_SERVER_NAME
root=$KILN_INPUT_ROOT
proxy=$KILN_INPUT_PROXY

case $server_name in
  '' | *[!A-Za-z0-9._*\ -]*) invalid server_name "\"$server_name\" is not a list of host names" ;;
esac
case $root in
  '' | /*) ;;
  *) invalid root "\"$root\" is not an absolute path" ;;
esac
case $root in
  *[\"\\\$\;{}]*) invalid root "\"$root\" holds a character that means something to nginx" ;;
esac
case $proxy in
  '' | http://?* | https://?*) ;;
  *) invalid proxy "\"$proxy\" does not begin with http:// or https://" ;;
esac
case $proxy in
  *[[:space:]]* | *[\"\'\\\;{}\$]*) invalid proxy "\"$proxy\" holds a character that means something to nginx" ;;
esac

# Amazon Linux 2 keeps nginx apart from its other packages.
if has amazon-linux-extras && ! pkg_installed nginx; then
  amazon-linux-extras enable nginx1 >/dev/null
fi
pkg_install nginx

main=/etc/nginx/nginx.conf
grep -q 'conf\.d/\*\.conf' "$main" || die "$main does not include conf.d/*.conf"

# The distributions' own sites: a link (Debian), a file (nginx.org), a block in nginx.conf (Fedora, SUSE).
if [ -L /etc/nginx/sites-enabled/default ]; then
  rm /etc/nginx/sites-enabled/default
  say "disabled the distribution's default site"
fi
if [ -f /etc/nginx/conf.d/default.conf ]; then
  mv /etc/nginx/conf.d/default.conf /etc/nginx/conf.d/default.conf.off
  say "disabled the distribution's default site"
fi
# A block with a name or a certificate of its own is somebody's site and stays.
without_stock_server() {
  awk '
    { code = $0; sub(/#.*/, "", code) }
    !inside && code ~ /^[ \t]*server[ \t]*\{/ { inside = 1; stock = 1; depth = 0; block = "" }
    inside {
      block = block $0 "\n"
      if (code ~ /server_name/ && code !~ /server_name[ \t]+(_|localhost)[ \t]*;/) stock = 0
      if (code ~ /ssl_certificate/) stock = 0
      depth += gsub(/\{/, "", code) - gsub(/\}/, "", code)
      if (depth == 0) {
        inside = 0
        if (stock) print "    # the server that stood here gave way to conf.d/kiln.conf"
        else printf "%s", block
      }
      next
    }
    { print }
    END { if (inside) printf "%s", block }
  ' "$1"
}
without_stock_server "$main" | put_file "$main"

if [ -z "$root" ]; then
  if os_is debian || os_is ubuntu; then
    files=/var/www/html
  elif [ -d /srv/www/htdocs ]; then
    files=/srv/www/htdocs
  else
    files=/usr/share/nginx/html
  fi
else
  files=$root
fi
if [ ! -d "$files" ]; then
  mkdir -p "$files"
  relabel "$files"
fi

pass() {
  printf '        proxy_pass %s;\n' "$proxy"
  cat <<'CONF'
        proxy_http_version 1.1;
        proxy_set_header Host $host;
        proxy_set_header X-Real-IP $remote_addr;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        proxy_set_header X-Forwarded-Proto $scheme;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $kiln_connection;
CONF
}

site() {
  echo "# written by kiln's nginx provisioner"
  if [ -n "$proxy" ]; then
    cat <<'CONF'
map $http_upgrade $kiln_connection {
    default upgrade;
    '' '';
}

CONF
  fi
  cat <<CONF
server {
    listen $port default_server;
    listen [::]:$port default_server;
    server_name $server_name;
CONF
  if [ -z "$proxy" ] || [ -n "$root" ]; then
    printf '    root "%s";\n' "$files"
    echo '    index index.html index.htm index.nginx-debian.html;'
  fi
  printf '\n    location / {\n'
  if [ -z "$proxy" ]; then
    # shellcheck disable=SC2016 # nginx's variables
    echo '        try_files $uri $uri/ =404;'
  elif [ -n "$root" ]; then
    # shellcheck disable=SC2016 # nginx's variables
    printf '        try_files $uri $uri/index.html @application;\n    }\n\n    location @application {\n'
    pass
  else
    pass
  fi
  printf '    }\n}\n'
}
site | put_file /etc/nginx/conf.d/kiln.conf

# SELinux lets nginx listen and connect only where its policy says.
if selinux_used; then
  case $port in
    80 | 81 | 443 | 488 | 8008 | 8009 | 8080 | 8443 | 9000) ;;
    *)
      has semanage || pkg_install policycoreutils-python-utils
      semanage port -a -t http_port_t -p tcp "$port" 2>/dev/null ||
        semanage port -m -t http_port_t -p tcp "$port" ||
        die "SELinux would not let nginx listen on port $port"
      ;;
  esac
  case $files in
    /var/www | /var/www/* | /usr/share/nginx/* | /srv/www/*) ;;
    *)
      if [ -z "$proxy" ] || [ -n "$root" ]; then
        has semanage || pkg_install policycoreutils-python-utils
        files_regex=$(printf '%s' "$files" | sed 's/[].[^$*+?(){}|\\]/\\&/g')
        semanage fcontext -a -t httpd_sys_content_t "$files_regex(/.*)?" 2>/dev/null ||
          semanage fcontext -m -t httpd_sys_content_t "$files_regex(/.*)?"
        relabel "$files"
      fi
      ;;
  esac
  if [ -n "$proxy" ] && has setsebool; then
    setsebool -P httpd_can_network_connect on
  fi
fi

nginx -t -q || die "nginx refuses its configuration; its own words are above"
service_enable nginx
if systemd_runs; then
  systemctl try-reload-or-restart nginx
fi
say "nginx will serve on port $port"
