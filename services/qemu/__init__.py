"""The device model of one VM: devices, PCI, RTAS, the device tree. It never sees secure memory in plain."""
