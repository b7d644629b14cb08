"""The hypervisor: VMs, memory slots, hypercalls, TCE tables, interrupt controller, terminal."""
