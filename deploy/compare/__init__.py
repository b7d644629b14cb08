"""`pefbox compare`: every DMA design on the same work, measured in one run, and a report of it.

`plan` says which VMs are run, `vm_files` makes what one is started from, `measure` runs it and reads off what it
came to, `results` puts the outcomes together by design, `costs` turns counts into time on real hardware, `claims`
holds the discussion's claims against the counts, `report` writes it all down.
"""
