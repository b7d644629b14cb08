#!/bin/busybox sh
# The first process of the guest: mounts what a shell needs and gives one on the console, again when it ends.
# With pefbox.run=COMMAND on the kernel's command line it runs that instead (%20 is a space), then powers off.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev 2>/dev/null
/bin/busybox mkdir -p /dev/pts
/bin/busybox mount -t devpts devpts /dev/pts
/bin/busybox mount -t tmpfs tmpfs /tmp
/bin/busybox --install -s
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=vt100
svm=$(cat /sys/devices/system/cpu/svm 2>/dev/null || echo 0)
echo "pefbox: linux $(uname -r), svm $svm"
for word in $(cat /proc/cmdline); do
    case $word in
    pefbox.run=*)
        run=$(echo "${word#pefbox.run=}" | sed 's/%20/ /g')
        setsid cttyhack sh -c "$run"
        echo "pefbox: exit status $?"
        poweroff -f
        ;;
    esac
done
while true; do
    setsid cttyhack sh -l
done
