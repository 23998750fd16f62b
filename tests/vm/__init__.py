"""Runs a command on a kernel that has device-mapper: this one, or Debian's own in a virtual machine."""
