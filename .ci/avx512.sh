#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Runs test executables in Bochs, which emulates a Skylake-X with AVX-512. QEMU's emulator stops at
# AVX2.
#
#     .ci/avx512.sh [-f GTEST_FILTER] [-t SECONDS] [-c FLAGS -e ISAS] WORK TEST...
#
# FLAGS are CPU features that the guest kernel is to ignore. CPUID still reports AVX, AVX2 and
# AVX-512, but the kernel does not enable their registers: with avx512f, those up to AVX2 remain;
# with avx, those of SSE; with xsave, programs cannot even query them (XGETBV faults). ISAS are the
# instruction sets that the library must then find, best first (default avx512,avx2,baseline).
#
# WORK is the working directory, created if missing. It keeps the kernel for the next call and,
# after a failure, the logs. Each TEST must be statically linked (-DCMAKE_EXE_LINKER_FLAGS=-static),
# since the guest has no other files. Prints the tests' output. Exits with 0 only if every TEST
# does, within SECONDS of wall time (default 1200).
#
# Needs Debian's packages binutils bochs bochs-term bochsbios cpio gcc isolinux libc6-dev
# syslinux-common vgabios xorriso, and apt-get to download (not install) a kernel.
set -euo pipefail

filter='*'
seconds=1200
isas=avx512,avx2,baseline
missing=
while getopts c:e:f:t: option; do
  case $option in
    c) missing=,$OPTARG ;;
    e) isas=$OPTARG ;;
    f) filter=$OPTARG ;;
    t) seconds=$OPTARG ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
if (($# < 2)); then
  echo "usage: ${0##*/} [-f GTEST_FILTER] [-t SECONDS] [-c FLAGS -e ISAS] WORK TEST..." >&2
  exit 2
fi
mkdir -p "$1"
work=$(cd "$1" && pwd)
shift

fail() {
  echo "error: $*" >&2
  exit 1
}

# ---- the kernel: Debian's cloud kernel, small and quick to boot ----------------------------------

if [[ ! -f $work/vmlinuz ]]; then
  package=$(apt-cache depends --important linux-image-cloud-amd64 |
    awk '/Depends: linux-image-/ { print $2 }')
  [[ -n $package ]] || fail "apt does not know linux-image-cloud-amd64; run apt-get update"
  (
    cd "$work"
    rm -rf deb
    mkdir deb
    cd deb
    apt-get download -qq "$package" 2>apt.log ||
      { cat apt.log >&2 && fail "apt-get download $package"; }
    dpkg-deb --fsys-tarfile ./*.deb | tar --extract --wildcards './boot/vmlinuz-*'
    # Last, so that the file is complete if it exists.
    mv boot/vmlinuz-* ../vmlinuz
    rm -r ../deb
  )
fi

# ---- the initramfs: /init and the tests ----------------------------------------------------------

rm -rf "$work/guest" "$work/iso"
mkdir -p "$work"/guest/{dev,tests,tmp} "$work/iso"
for test in "$@"; do
  [[ -x $test ]] || fail "$test is not an executable"
  # Not grep -q: it exits early, and readelf would fail with SIGPIPE.
  ! readelf --program-headers --wide "$test" | grep INTERP >/dev/null ||
    fail "$test is not statically linked"
done
cp -- "$@" "$work/guest/tests"
printf '%s' "$filter" >"$work/guest/filter"

cat >"$work/init.c" <<'END'
#define _GNU_SOURCE
#include <cpuid.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

static int is_visible(const struct dirent* entry) { return entry->d_name[0] != '.'; }

/* Returns 0 if CPUID reports all sets. The tests find out which ones the kernel enabled. */
static int lacks_a_set(void) {
  unsigned a, b, c, d, low = 0, high = 0;
  __cpuid_count(1, 0, a, b, c, d);
  const unsigned osxsave = c >> 27 & 1, avx = c >> 28 & 1;
  if (osxsave) __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  __cpuid_count(7, 0, a, b, c, d);
  const unsigned avx2 = b >> 5 & 1;
  const unsigned avx512 = (b >> 16 & 1) + (b >> 17 & 1) + (b >> 30 & 1) + (b >> 31 & 1);
  printf("avx512.sh: CPUID: avx %u, avx2 %u, avx512 %u of 4; OSXSAVE %u, XCR0 %#x\n", avx, avx2,
         avx512, osxsave, low);
  return !(avx && avx2 && avx512 == 4);
}

static int run(const char* name) {
  int status = 0;
  char path[512];
  snprintf(path, sizeof path, "/tests/%s", name);
  printf("avx512.sh: %s\n", name);
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    execl(path, name, (char*)NULL);
    perror(path);
    _exit(127);
  }
  if (child < 0 || waitpid(child, &status, 0) != child) return 1;
  printf("avx512.sh: %s: %s %d\n", name, WIFEXITED(status) ? "exit status" : "signal",
         WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status));
  return status != 0;
}

int main(void) {
  int failures = 0;
  char filter[4096] = "";
  struct dirent** tests = NULL;
  mount("dev", "/dev", "devtmpfs", 0, NULL);
  failures += lacks_a_set();

  FILE* file = fopen("/filter", "r");
  if (!file || !fgets(filter, sizeof filter, file)) ++failures;
  setenv("GTEST_FILTER", filter, 1);
  setenv("GTEST_COLOR", "no", 1);
  const int count = failures ? 0 : scandir("/tests", &tests, is_visible, alphasort);
  if (count <= 0) ++failures;
  for (int i = 0; i < count; ++i) failures += run(tests[i]->d_name);

  printf("avx512.sh: %s\n", failures ? "FAILED" : "all passed");
  fflush(stdout);
  sleep(1); /* flush the serial port */
  /* Bochs' shutdown port. */
  iopl(3);
  for (const char* c = "Shutdown"; *c; ++c) outb((unsigned char)*c, 0x8900);
  for (;;) pause();
}
END
gcc -O1 -static -o "$work/guest/init" "$work/init.c"
(cd "$work/guest" && find . | cpio --quiet --create --format=newc --owner=0:0) >"$work/iso/initrd"

# ---- the boot CD ---------------------------------------------------------------------------------

# Emulated instructions per second of guest time, about what Bochs achieves in real time.
ips=100000000

forced=()
[[ -n $missing ]] || forced=("FUSEDADAM_ISA=${isas%%,*}")

options=(
  # Only critical kernel messages: they share the serial port with the tests.
  initrd=/initrd console=ttyS0,115200 loglevel=2
  # After a panic, reset at once by a triple fault, which ends Bochs.
  panic=-1 reboot=t
  # Bochs 2.7 reports a wrong size of the compacted XSAVE area, which makes Linux disable AVX.
  clearcpuid=xsavec,xsaves"$missing"
  # Linux puts unknown parameters into init's environment. Without missing features, force the best
  # set, so that any test checks that the library finds it; otherwise let the library choose.
  FUSEDADAM_EXPECTED_ISAS="$isas" "${forced[@]}"
  # The TSC advances by one per instruction, not at the rate that CPUID reports. Without this, the
  # kernel's delay loops would be 35 times too long.
  tsc_early_khz=$((ips / 1000)) lpj=$((ips / 250)) no_timer_check
  # Slow to start and not needed by tests.
  acpi=off cryptomgr.notests edd=off mitigations=off nokaslr
)
cat >"$work/iso/isolinux.cfg" <<END
DEFAULT linux
PROMPT 0
LABEL linux
KERNEL /vmlinuz
APPEND ${options[*]}
END
cp "$work/vmlinuz" /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 \
  "$work/iso"
xorriso -as mkisofs -quiet -o "$work/boot.iso" -b isolinux.bin -c boot.cat \
  -no-emul-boot -boot-load-size 4 -boot-info-table "$work/iso" 2>"$work/xorriso.log" ||
  { cat "$work/xorriso.log" >&2 && fail "xorriso"; }

# ---- Bochs ---------------------------------------------------------------------------------------

# The display is text on standard output, which is discarded: tests write to the serial port.
cat >"$work/bochsrc" <<END
display_library: term
sound: driver=dummy, waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
romimage: file=\$BXSHARE/BIOS-bochs-latest
vgaromimage: file=\$BXSHARE/VGABIOS-lgpl-latest
megs: 1024
cpu: model=corei7_skylake_x, count=1, ips=$ips, ignore_bad_msrs=1, reset_on_triple_fault=0
clock: sync=none, time0=utc
ata0-master: type=cdrom, path=boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial.log
log: bochs.log
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
END
# Debian's Bochs includes the debugger, which waits for a command to continue.
echo c >"$work/debugger"

: >"$work/serial.log"
(
  cd "$work"
  # Bochs ignores SIGTERM.
  exec env -u BXSHARE TERM=vt100 timeout --kill-after=1 "$seconds" \
    bochs -q -f bochsrc -rc debugger </dev/null >/dev/null 2>bochs.err
) &
bochs=$!
trap 'kill "$bochs" 2>/dev/null || true' EXIT
tail --follow --lines=+1 --sleep-interval=0.5 --pid="$bochs" "$work/serial.log" |
  sed --unbuffered 's/\r//'
status=0
wait "$bochs" || status=$?
trap - EXIT

# Bochs exits with 1 when its guest shuts down, so its status only shows a timeout.
((status != 124 && status != 137)) || fail "not done after $seconds s"
if ! grep -q $'^avx512.sh: all passed\r*$' "$work/serial.log"; then
  if ! grep -q 'avx512.sh: FAILED' "$work/serial.log"; then
    tail -n 5 "$work/bochs.err" >&2
    grep -F '>>PANIC<<' "$work/bochs.log" >&2 || true
  fi
  fail "tests failed in Bochs; its logs are in $work"
fi
