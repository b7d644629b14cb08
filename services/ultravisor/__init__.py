"""The ultravisor: owns secure memory, verifies what becomes secure, stands between a secure VM and KVM."""
