"""The virtio console device with one port: queue 0 takes typed bytes to the driver, queue 1 brings what it prints.

Source: VIRTIO 1.4, section 5.3.
"""

from __future__ import annotations

RECEIVE_QUEUE = 0
TRANSMIT_QUEUE = 1
