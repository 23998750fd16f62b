"""The demonstration behind `make demo`: the whole main job on real input and a real kernel's dm_crypt."""
