#!/bin/sh
# A stand-in for the CNI plugin: a veth per pod, routed by the node, IPv4 only.
set -e
conf=$(cat)
log=$(printf %s "$conf" | sed 's/.*"logFile":"\([^"]*\)".*/\1/')
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_ARGS" >> "$log"
[ "$CNI_COMMAND" = STATUS ] && exit 0
device=v$(printf %.10s "$CNI_CONTAINERID" | tr -d -)
netns=$(basename "$CNI_NETNS")
if [ "$CNI_COMMAND" = DEL ]; then
    ip link delete "$device" 2>/dev/null || true
    exit 0
fi
case "$CNI_ARGS" in *K8S_POD_NAME=refused*)
    echo '{"cniVersion":"1.1.0","code":11,"msg":"the stand-in refuses","details":"by name"}'
    exit 1
esac
node=$(ip -4 -o address show dev eth0 | sed 's/.*\.\([0-9]*\)\/24.*/\1/')
number=$(grep -c '^ADD' "$log")
address=10.99.$node.$((number + 1))
ip link add "$device" type veth peer name eth0 netns "$netns"
ip address add "10.99.$node.1/32" dev "$device"
ip link set "$device" up
ip route add "$address/32" dev "$device"
ip -n "$netns" address add "$address/32" dev eth0
ip -n "$netns" link set eth0 up
ip -n "$netns" route add "10.99.$node.1" dev eth0
ip -n "$netns" route add default via "10.99.$node.1"
echo "{\"cniVersion\":\"1.1.0\",\"ips\":[{\"address\":\"$address/32\"}]}"
