"""The peer is a library: real ultravisor and kvm processes, with guest, qemu and launcher played by the caller."""
