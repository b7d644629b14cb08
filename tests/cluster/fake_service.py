"""A process that speaks the control protocol and nothing else: what the launcher is tested with.

It plays any role. Orders come as queries: `seen` tells what arrived so far, `hang` stops answering for good,
`notice` and `give` send packets, `exit` ends it. kvm answers `vm.status`; its state is set with `set-vm`. What it
answers to the questions of a migration is set with `set-answer`; `channel` uses its end of the way for the bulk.
"""

from __future__ import annotations

import argparse
import array
import ctypes
import os
import signal
import socket
import time
from typing import Any

from protocol import control
from protocol.startup import ProcessConfig

_INT_BYTES = array.array("i").itemsize


class FakeService:
    """State and packet loop of one fake process."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)
        self.events: list[str] = []
        self.files: dict[str, int] = {}
        self.gifts: dict[str, list[Any]] = {}
        self.vms: dict[str, dict[str, Any]] = {}
        self.configs: list[ProcessConfig] = []
        self.keys: list[str] = []
        self.account: dict[str, int] = {}
        self.channel: socket.socket | None = None
        self.answers: dict[str, Any] = {
            "migration.status": {"status": "none"},
            "migration.certificate": {"certificate": "00", "measurement": "11", "debuggable": False, "version": 1},
            "migration.check": {"reason": None},
            "migration.start": None,
            "migration.started": {"status": "active"},
            "migration.set": None,
            "migration.cancel": None,
            "migration.refused": None,
            "migration.resume": None,
            "migration.has-started": None,
            "migration.word": {"word": None, "session": "dd"},
            "migration.abandon": {"word": "aa"},
            "migration.take": {"word": "bb", "moved": True},
            "link.shape": None,
            "snapshot.status": {"status": "none", "ready": True},
            "snapshot.save": None,
            "snapshot.commit": None,
            "snapshot.cancel": None,
            "snapshot.restore": None,
        }

    def send(self, packet: control.FromProcess, fd: int | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else []
        self.socket.sendmsg([control.encode(packet)], rights)

    def receive(self) -> tuple[control.ToProcess, list[int]]:
        space = socket.CMSG_SPACE(control.MAX_DESCRIPTORS * _INT_BYTES)
        data, ancillary, _, _ = self.socket.recvmsg(control.MAX_PACKET_BYTES, space)
        if not data:
            raise SystemExit(3)
        fds = array.array("i")
        for _, _, rights in ancillary:
            fds.frombytes(rights)
        return control.decode_to_process(data), list(fds)

    def run(self) -> None:
        self.send(control.Hello(os.getpid()))
        while True:
            packet, fds = self.receive()
            self.events.append(type(packet).__name__)
            if isinstance(packet, control.Stop):
                return
            self.take(packet, fds)

    def take(self, packet: control.ToProcess, fds: list[int]) -> None:
        match packet:
            case control.Start(config):
                self.start(config, fds)
            case control.TakeKeys(keys):
                self.keys = sorted([key.link for key in keys.links] + list(keys.identity))
                self.give_first()
                self.send(control.Ready())
            case control.AddVm(vm, links, keys, names):
                self.files.update(zip(names, fds, strict=True))
                self.vms[vm.name] = {"state": "running", "secure": False, "pages": {"normal": vm.memory_bytes >> 16}}
                self.keys += [f"{key.link}" for key in keys.links]
                self.events.append(f"added {vm.name}.{vm.incarnation} {sorted(link.id for link in links)}")
                if vm.restoring:
                    self.events.append(f"{vm.name} is restoring")
                if vm.incoming:
                    self.events.append(f"{vm.name} is incoming")
            case control.RemoveVm(order, name):
                self.vms.pop(name, None)
                self.events.append(f"removed {name}")
                self.send(control.Answer(order))
            case control.PeerState(peer, state):
                self.events.append(f"{peer} {state}")
            case control.Gift("migration-source" | "migration-destination" as tag, _, giver):
                self.gifts[tag] = [giver, ""]
                self.channel = socket.socket(fileno=fds[0])
            case control.ReplaceLinks(links, keys):
                assert {link.id for link in links} == {key.link for key in keys.links}
                self.events.append(f"replaced {sorted(link.id for link in links)}")
            case control.Gift(tag, _, giver):
                self.gifts[tag] = [giver, os.pread(fds[0], 100, 0).decode(errors="replace")]
                os.close(fds[0])
            case control.Ping(sequence):
                self.events.pop()
                self.send(control.Pong(sequence))
            case control.Query():
                self.answer(packet)

    def start(self, config: ProcessConfig, fds: list[int]) -> None:
        self.configs.append(config)
        self.files = dict(zip(config.descriptors, fds, strict=True))
        os.write(self.files["log"], b'{"event":"started"}\n')
        if "fail-" + config.target in os.environ.get("PEFBOX_FAKE", ""):
            self.send(control.Failed("told to fail"))
            raise SystemExit(1)
        if "silent-" + config.target in os.environ.get("PEFBOX_FAKE", ""):
            return
        for vm in config.vms:
            self.vms[vm.name] = {"state": "running", "secure": False, "pages": {"normal": vm.memory_bytes >> 16}}
            if vm.restoring and "restore-fails" in os.environ.get("PEFBOX_FAKE", ""):
                self.answers["snapshot.status"] = {"status": "failed", "reason": "told to fail", "ready": True}
        self.send(control.Confined({"landlock": "on"}))

    def give_first(self) -> None:
        """kvm has something for the qemu of each VM, long before that one has its keys."""
        if self.configs[0].role == "kvm":
            for vm in self.vms:
                self.give("host-view", vm)

    def give(self, tag: str, vm: str) -> None:
        fd = os.memfd_create("gift")
        os.write(fd, f"{tag} of {vm}".encode())
        self.send(control.Give(tag, vm), fd)
        os.close(fd)

    def answer(self, query: control.Query) -> None:
        arguments = query.arguments
        match query.what:
            case "seen":
                config = self.configs[0]
                result: Any = {
                    "events": self.events,
                    "gifts": self.gifts,
                    "keys": self.keys,
                    "files": sorted(self.files),
                    "links": [link.id for link in config.links],
                    "config": {"run_dir": config.run_dir, "record": config.record, "debuggable": config.debuggable},
                    "vms": [[vm.name, vm.incarnation, vm.incoming] for vm in config.vms],
                    "restoring": [vm.name for vm in config.vms if vm.restoring],
                    "open": sorted(os.listdir("/proc/self/fd"), key=int),
                }
            case "vm.status" if arguments["vm"] not in self.vms:
                self.send(control.Answer(query.id, error=f"no VM {arguments['vm']}"))
                return
            case "vm.status":
                result = self.vms[arguments["vm"]] | (
                    {"last_esm": None} if "ultravisor" in self.configs[0].role else {}
                )
            case "statistics":
                counts = dict.fromkeys(("calls", "open_calls", "serving", "queued", "refused"), 0)
                result = {link.id: {"peer": link.peer, **counts} for link in self.configs[0].links}
            case "set-vm":
                result = self.vms[arguments["vm"]].update(arguments["values"])
            case "account":
                result = {"total_bytes": self.configs[0].secure_memory_bytes, "used_bytes": 0} | self.account
            case "write-ram":
                result = os.pwrite(self.files[f"ram:{arguments['vm']}"], arguments["data"], 0)
            case "read-ram":
                result = os.pread(self.files[f"ram:{arguments['vm']}"], 16, 0)
            case "send-private":
                result = os.write(self.files[f"secure:{arguments['vm']}"], arguments["data"])
            case "read-private":
                result = os.read(self.files[f"secure:{arguments['vm']}"], 100)
            case "ask-launcher":
                with socket.socket(socket.AF_UNIX) as asking:
                    asking.connect(arguments["path"])
                    asking.settimeout(3)
                    result = asking.recv(1)
            case "set-account":
                result = self.account.update(arguments)
            case "set-answer":
                result = self.answers.update(arguments)
            case "channel":
                assert self.channel is not None
                if "send" in arguments:
                    self.channel.sendall(arguments["send"])
                result = None if "send" in arguments else self.channel.recv(100)
            case what if what in self.answers:
                if what not in ("migration.status", "snapshot.status"):
                    self.events.append(f"{what} {arguments}")
                result = self.answers[what]
                if isinstance(result, dict) and "refused" in result:
                    self.send(control.Answer(query.id, error=result["refused"]))
                    return
                if what == "migration.start":
                    self.answers["migration.status"] = self.answers["migration.started"]
            case "notice":
                self.send(control.Notice(arguments["what"], arguments["vm"], arguments.get("detail", "")))
                result = None
            case "give":
                self.give(arguments["tag"], arguments["vm"])
                result = None
            case "console.read":
                result = {"data": b"hello\n"[arguments["since"] :], "next": 6}
            case "console.write":
                result = {"taken": min(len(arguments["data"]), 4)}
                self.events.append(f"typed {arguments['data'][:4].decode()!r}")
            case "hang":
                while True:
                    signal.pause()
            case "slow":
                time.sleep(arguments["seconds"])
                result = None
            case "exit":
                os._exit(arguments["status"])
            case _:
                self.send(control.Answer(query.id, error=f"knows no {query.what}"))
                return
        self.send(control.Answer(query.id, result))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    FakeService(parser.parse_args().control_fd).run()


if __name__ == "__main__":
    main()
