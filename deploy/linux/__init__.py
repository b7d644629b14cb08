"""The Linux kernel and initial RAM disk for guests that run real POWER code: fetched, built and cached."""
