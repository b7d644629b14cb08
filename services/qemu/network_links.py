"""The links of a VM's networks: what comes over them goes to the switch, and what the switch sends goes out or is lost.

A link is never waited for (L1): frames for a peer that is gone, stopped or slow are dropped and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from protocol import messages as m
from protocol.errors import HostFault
from protocol.startup import LinkEntry, LinkKey, VmEntry
from protocol.wire import Envelope
from services.qemu.frame_delay import FrameDelay
from services.qemu.network import Drop, PeerPort, Switch
from services.qemu.shaping import Shaper
from services.runtime.cause import CAUSE
from services.runtime.link import Link
from services.runtime.process import Runtime
from shared.link_shape import PLAIN, LinkShape


class NetworkLinks:
    """The VM's ends of its networks, and their links by network and peer."""

    def __init__(self, runtime: Runtime, vm: VmEntry) -> None:
        self.switches = {device.network: Switch(device.mtu) for device in vm.devices if device.network is not None}
        self._runtime = runtime
        self._links: dict[tuple[str, str], Link] = {}
        self._delays: dict[str, FrameDelay] = {}
        """By peer, of those whose link ever had a shape."""

    async def open(self, entries: list[LinkEntry], keys: Mapping[str, LinkKey]) -> None:
        """Open links; each takes the place of one of an earlier incarnation of its peer. Others stay as they are."""
        for entry in entries:
            if entry.network not in self.switches:
                self._runtime.log.error("link of a network that this VM is not on", link=entry.id)
                continue
            key = (entry.network, entry.peer)
            earlier = self._links.pop(key, None)
            if earlier is not None:
                await self._runtime.close_link(earlier)
            try:
                self._links[key] = await self._open(entry, keys[entry.id], self.switches[entry.network])
            except HostFault as error:
                self._runtime.log.error("network link not opened", link=entry.id, reason=str(error))

    def set_shapes(self, shapes: Mapping[str, LinkShape]) -> None:
        """The links to the hosts of these peers have shapes, and those to all others none, from now on."""
        for peer in shapes.keys() - self._delays.keys():
            source = Random(f"{self._runtime.config.seed}:{peer}")
            self._delays[peer] = FrameDelay(Shaper(source), self._runtime.nursery)
        for peer, delay in self._delays.items():
            delay.set_shape(shapes.get(peer, PLAIN))
        for switch in self.switches.values():
            for peer, port in switch.peers.items():
                port.delay = self._delays.get(peer)

    def status(self) -> list[dict[str, object]]:
        """For each network: what is known of its peers."""
        return [
            {
                "network": name,
                "addresses": len(switch.table),
                "peers": [self._peer_status(name, peer, port) for peer, port in switch.peers.items()],
            }
            for name, switch in self.switches.items()
        ]

    def _peer_status(self, network: str, peer: str, port: PeerPort) -> dict[str, object]:
        link = self._links.get((network, peer))
        state = "closed" if link is None else link.peer_state
        return {"vm": peer.partition("/")[0], "state": state, **port.traffic.as_dict()}

    async def _open(self, entry: LinkEntry, key: LinkKey, switch: Switch) -> Link:
        link = self._runtime.make_link(entry, key)

        def offer(frames: list[bytes]) -> Drop | None:
            if link.peer_state != "up":
                return Drop.PEER_LOST
            return None if link.offer_event(m.NET_FRAMES, m.NetFramesBody(frames), CAUSE.get()) else Drop.PEER_FULL

        port = switch.connect(entry.peer, offer)
        port.delay = self._delays.get(entry.peer)

        def take(envelope: Envelope, body: m.NetFramesBody) -> None:
            CAUSE.set(envelope.cause)
            switch.from_peer(body.frames, port)

        link.on(m.NET_FRAMES, take)
        await self._runtime.serve_link(link)
        return link
