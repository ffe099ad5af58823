#!/usr/bin/env bash
# Builds the native libraries that wheels carry, static and position independent:
#
#   tools/build_deps.sh [PREFIX]        (default /opt/imgcore-deps)
#
# The sources are the Debian archive's, pinned by SHA-256.  They are taken from
# $IMGCORE_DEPS_CACHE, else by apt-get from the machine's mirror, else by curl from the
# URL $IMGCORE_DEBIAN_MIRROR (such as https://deb.debian.org/debian).  If PREFIX already
# has the same versions, the script does nothing; it is replaced only once every source
# is there.  OpenSSL's build needs perl.
set -euo pipefail
prefix=${1:-/opt/imgcore-deps}
cache=${IMGCORE_DEPS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/imgcore-deps}
mirror=${IMGCORE_DEBIAN_MIRROR:-}
suite=trixie

# Source package, file, SHA-256.  BLAKE3's C library is in the crate that a package has.
sources=(
  "openssl openssl_3.5.7.orig.tar.gz a8c0d28a529ca480f9f36cf5792e2cd21984552a3c8e4aa11a24aa31aeac98e8"
  "rust-blake3 librust-blake3-dev_1.8.1-1_amd64.deb d3337b6525a6544f401039784603c97aa4bf84aec262cdb6204f5d7ff0173d8f"
  "libdeflate libdeflate_1.23.orig.tar.gz 1ab18349b9fb0ce8a0ca4116bded725be7dcbfa709e19f6f983d99df1fb8b25f"
  "libisal libisal_2.31.1.orig.tar.gz e1d5573a4019738243b568ab1e1422e6ab7557c5cae33cc8686944d327ad6bb4"
  "libzstd libzstd_1.5.7+dfsg.orig.tar.xz 0c092ef267edce57ba7f3f2645c861f72eaf5e76273c6c3632869423464b90a5"
  "liburing liburing_2.9.orig.tar.gz 57e9b36e4ac1e46b8e0351dfb1694dc59638fc25e384b4ba36d87b800b16db1a"
)

made_by=$(sha256sum <"$0")
if [[ -e $prefix/made-by && $(<"$prefix/made-by") == "$made_by" ]]; then
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$cache"
flags="-O3 -fPIC -fvisibility=hidden"
cc=${CC:-cc}
jobs=$(nproc)

is_pinned() { [[ -e $1 ]] && echo "$2  $1" | sha256sum --check --status; }

# Uses separate package lists, so that the machine's apt is not changed.
apt_source() {
  local package=$1 file=$2 apt=$work/apt keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  command -v apt-get >/dev/null && [[ -e $keyring ]] || return 1
  local options=(-q -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::State::Lists="$apt/lists" -o Dir::Cache="$apt/cache" -o APT::Sandbox::User="$(id -un)")
  if [[ ! -e $apt ]]; then
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    local archive
    archive=$(apt-get indextargets --format '$(REPO_URI)' | grep -m 1 '/debian/*$') || return 1
    printf '%s [signed-by=%s arch=amd64] %s %s main\n' deb "$keyring" "$archive" "$suite" \
      deb-src "$keyring" "$archive" "$suite" >"$apt/sources.list"
    apt-get "${options[@]}" update >"$apt/log" 2>&1 || return 1
  fi
  local words=(source --download-only --tar-only "$package")
  if [[ $file == *.deb ]]; then
    words=(download "${file%%_*}:amd64")
  else
    # The newest version of the pinned release: there may be newer releases.
    local release=${file#*_} version
    version=$(apt-cache "${options[@]}" showsrc --only-source "$package" 2>>"$apt/log" |
      sed -n 's/^Version: //p' | grep -F -e "${release%.orig.*}-" | sort -V | tail -n 1)
    [[ -z $version ]] || words[3]+="=$version"
  fi
  (cd "$cache" && apt-get "${options[@]}" "${words[@]}") >>"$apt/log" 2>&1
}

# Tries again after a failed or shortened transfer.  The cache gets pinned files only.
curl_source() {
  local package=$1 file=$2 digest=$3 part=$work/$2 attempt
  [[ -n $mirror ]] || return 1
  local part_of_pool=${package:0:1}
  [[ $package != lib* ]] || part_of_pool=${package:0:4}
  local url=${mirror%/}/pool/main/$part_of_pool/$package/$file
  for attempt in 1 2 3; do
    (( attempt == 1 )) || sleep "$attempt"
    curl --fail --silent --show-error --location --connect-timeout 30 --max-time 300 \
      --output "$part" "$url" || continue
    if is_pinned "$part" "$digest"; then
      cp "$part" "$cache/$file.part" && mv "$cache/$file.part" "$cache/$file"
      return
    fi
    echo "build_deps: $url is not the pinned file" >&2
  done
  return 1
}

fetch() {
  local package=$1 file=$2 digest=$3
  is_pinned "$cache/$file" "$digest" && return
  apt_source "$package" "$file" && is_pinned "$cache/$file" "$digest" && return
  curl_source "$package" "$file" "$digest" && return
  echo "build_deps: $file with SHA-256 $digest is not available: put it into $cache, or set IMGCORE_DEBIAN_MIRROR" >&2
  exit 1
}

unpack() {
  if [[ $1 == *.deb ]]; then
    ar p "$1" data.tar.xz | tar -xJ -C "$2"
  else
    tar -xf "$1" -C "$2" --strip-components=1
  fi
}

# write_pc NAME VERSION LINK_NAME: writes the file with which setup.py finds a library.
write_pc() {
  cat >"$prefix/lib/pkgconfig/$1.pc" <<EOF
Name: $1
Description: $1, static, built by imgcore's tools/build_deps.sh
Version: $2
Libs: -L$prefix/lib -l$3
Cflags: -I$prefix/include
EOF
}

# Only what SHA-256 needs, with its assembly.  It reads no configuration file, and leaves
# nothing to do when the process ends.
build_openssl() {
  local target=linux-x86_64
  [[ $($cc -dumpmachine) != aarch64* ]] || target=linux-aarch64
  CC="$cc" CFLAGS="$flags" ./Configure "$target" no-bulk no-legacy no-deprecated no-http no-tls \
    no-dtls no-sock no-ec no-scrypt no-slh-dsa no-apps no-tests no-docs
  make -s -j"$jobs" build_generated libcrypto.a
  cp libcrypto.a "$prefix/lib/"
  cp -r include/openssl "$prefix/include/"
  write_pc libcrypto 3.5.7 crypto
}

build_rust_blake3() {
  local sources=(blake3.c blake3_dispatch.c blake3_portable.c)
  case $($cc -dumpmachine) in
  x86_64*) sources+=(blake3_{sse2,sse41,avx2,avx512}_x86-64_unix.S) ;;
  aarch64*) sources+=(blake3_neon.c) ;;
  esac
  cd usr/share/cargo/registry/blake3-1.8.1/c
  $cc $flags -c "${sources[@]}"
  ar crs "$prefix/lib/libblake3.a" ./*.o
  cp blake3.h "$prefix/include/"
  write_pc libblake3 1.8.1 blake3
}

build_libdeflate() {
  mkdir objects
  (cd objects && $cc $flags -c ../lib/*.c ../lib/*/*.c)
  ar crs "$prefix/lib/libdeflate.a" objects/*.o
  cp libdeflate.h "$prefix/include/"
  write_pc libdeflate 1.23 deflate
}

build_libisal() {
  local machine
  machine=$($cc -dumpmachine)
  make -s -f Makefile.unx -j"$jobs" units="igzip crc" host_cpu="${machine%%-*}" CC="$cc $flags" lib
  cp bin/isa-l.a "$prefix/lib/libisal.a"
  mkdir -p "$prefix/include/isa-l"
  cp include/crc*.h include/igzip_lib.h "$prefix/include/isa-l/"
  write_pc libisal 2.31.1 isal
}

build_libzstd() {
  make -s -C lib -j"$jobs" CC="$cc" CFLAGS="$flags" ZSTD_LEGACY_SUPPORT=0 ZSTD_LIB_DICTBUILDER=0 libzstd.a
  cp lib/libzstd.a "$prefix/lib/"
  cp lib/zstd.h lib/zstd_errors.h "$prefix/include/"
  write_pc libzstd 1.5.7 zstd
}

build_liburing() {
  ./configure --prefix="$prefix" --cc="$cc" --use-libc >configure.log
  make -s -C src -j"$jobs" ENABLE_SHARED=0 CFLAGS="$flags" liburing.a
  cp src/liburing.a "$prefix/lib/"
  cp -r src/include/liburing.h src/include/liburing "$prefix/include/"
  write_pc liburing 2.9 uring
}

for source in "${sources[@]}"; do
  read -r package file digest <<<"$source"
  fetch "$package" "$file" "$digest"
done
rm -rf "$prefix"
mkdir -p "$prefix/lib/pkgconfig" "$prefix/include"
for source in "${sources[@]}"; do
  read -r package file digest <<<"$source"
  mkdir "$work/$package"
  unpack "$cache/$file" "$work/$package"
  set +e # in a condition, `set -e` has no effect inside the function
  (set -e; cd "$work/$package"; "build_${package//-/_}") >"$work/$package.log" 2>&1
  status=$?
  set -e
  if (( status )); then
    tail -n 20 "$work/$package.log" >&2
    echo "build_deps: $package could not be built" >&2
    exit 1
  fi
done
echo "$made_by" >"$prefix/made-by"
