"""The machine goes into a file, and comes out of one: qemu's part of a snapshot.

body      the file's frames, written and read
saver     the machine stands still, and all of it goes into the file
loader    all of it comes out, is checked, and goes on
control   both, as the launcher steers them
"""
