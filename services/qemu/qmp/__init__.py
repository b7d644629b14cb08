"""The QMP monitor of a machine: what the shell of the qemu process uses of it."""

# Redundant aliases mark these names as public for type checkers.
from services.qemu.qmp.commands import COMMANDS as COMMANDS
from services.qemu.qmp.commands import Command as Command
from services.qemu.qmp.commands import CommandTable as CommandTable
from services.qemu.qmp.events import BalloonChange as BalloonChange
from services.qemu.qmp.events import MonitorEvents as MonitorEvents
from services.qemu.qmp.events import Reset as Reset
from services.qemu.qmp.events import Resumed as Resumed
from services.qemu.qmp.events import Shutdown as Shutdown
from services.qemu.qmp.events import Stopped as Stopped
from services.qemu.qmp.host import open_monitor_socket as open_monitor_socket
from services.qemu.qmp.host import serve_monitors as serve_monitors
from services.qemu.qmp.machine import CommandFailed as CommandFailed
from services.qemu.qmp.machine import MachineControl as MachineControl
from services.qemu.qmp.machine import Monitored as Monitored
from services.qemu.qmp.schema import ErrorClass as ErrorClass
from services.qemu.qmp.schema import RunState as RunState
from services.qemu.qmp.schema import ShutdownCause as ShutdownCause
