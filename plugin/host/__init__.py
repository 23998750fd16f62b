"""The machine: other programs, files and locks, loop devices, device-mapper, mounts, block devices, uevents.

What is true is read from the kernel at every call; nothing here remembers. It knows nothing of images and volumes.
"""
