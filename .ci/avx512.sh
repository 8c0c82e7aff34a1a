#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Runs test executables in Bochs, which emulates a Skylake-X with AVX-512. QEMU's emulator stops at
# AVX2.
#
#     .ci/avx512.sh WORK GTEST_FILTER ISAS FLAGS TEST...
#
# WORK, created if missing, keeps the kernel for the next call and, after a failure, the logs. ISAS are
# the instruction sets that the library must find, best first. FLAGS are CPU features that the guest
# kernel is to ignore: CPUID reports them, but the kernel does not enable their registers. Each TEST
# must be statically linked (-DCMAKE_EXE_LINKER_FLAGS=-static), since the guest has no other files.
# Prints the tests' output. Exits with 0 only if every TEST does, within 1200 s.
#
# Needs Debian's packages binutils bochs bochs-term bochsbios busybox-static cpio isolinux
# syslinux-common vgabios xorriso, and apt-get to download (not install) a kernel.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

mkdir -p "$1"
work=$(cd "$1" && pwd) filter=$2 isas=$3 flags=$4
shift 4

# ---- the kernel: Debian's cloud kernel, small and quick to boot ----------------------------------

if [[ ! -f $work/vmlinuz ]]; then
  package=$(apt-cache depends --important linux-image-cloud-amd64 |
    awk '/Depends: linux-image-/ { print $2 }')
  (
    cd "$work"
    apt-get download -qq "$package"
    dpkg-deb --fsys-tarfile ./linux-image-*.deb | tar --extract --wildcards './boot/vmlinuz-*'
    # Last, so that the file is complete if it exists.
    mv boot/vmlinuz-* vmlinuz
  )
fi

# ---- the initramfs: /init and the tests ----------------------------------------------------------

rm -rf "$work/guest" "$work/iso"
mkdir -p "$work"/guest/{bin,dev,tests,tmp} "$work/iso"
cp -- "$@" "$work/guest/tests"
cp /bin/busybox "$work/guest/bin"

# Bochs' reset on a triple fault is off, so that the reset by the kernel ends Bochs.
cat >"$work/guest/init" <<'END'
#!/bin/busybox sh
export PATH=/bin GTEST_COLOR=no
busybox mount -t devtmpfs dev /dev
failures=0
for test in /tests/*; do
  status=0
  "$test" || status=$?
  echo "avx512.sh: ${test##*/}: exit status $status"
  failures=$((failures + (status != 0)))
done
case $failures in 0) echo "avx512.sh: all passed" ;; *) echo "avx512.sh: FAILED" ;; esac
busybox sleep 1 # flushes the serial port
busybox reboot -f
END
chmod +x "$work/guest/init"
(cd "$work/guest" && find . | cpio --quiet --create --format=newc --owner=0:0) >"$work/iso/initrd"

# ---- the boot CD ---------------------------------------------------------------------------------

# Emulated instructions per second of guest time, about what Bochs achieves in real time.
ips=100000000

forced=()
[[ -n $flags ]] || forced=("FUSEDADAM_ISA=${isas%%,*}")

options=(
  # Only critical kernel messages: they share the serial port with the tests.
  initrd=/initrd console=ttyS0,115200 loglevel=2
  # After a panic, reset at once by a triple fault, which ends Bochs.
  panic=-1 reboot=t
  # Bochs 2.7 reports a wrong size of the compacted XSAVE area, which makes Linux disable AVX.
  clearcpuid=xsavec,xsaves"${flags:+,$flags}"
  # Linux puts unknown parameters into init's environment. Without missing features, force the best
  # set, so that any test checks that the library finds it; otherwise let the library choose.
  FUSEDADAM_EXPECTED_ISAS="$isas" "${forced[@]}" GTEST_FILTER="$filter"
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
  exec env -u BXSHARE TERM=vt100 timeout --kill-after=1 1200 \
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
((status != 124 && status != 137)) || fail "not done after 1200 s"
if ! grep -q $'^avx512.sh: all passed\r*$' "$work/serial.log"; then
  if ! grep -q 'avx512.sh: FAILED' "$work/serial.log"; then
    tail -n 5 "$work/bochs.err" >&2
    grep -F '>>PANIC<<' "$work/bochs.log" >&2 || true
  fi
  fail "tests failed in Bochs; its logs are in $work"
fi
