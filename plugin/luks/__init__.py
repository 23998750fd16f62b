"""LUKS2: what a Secret asks for, headers (made by cryptsetup, read here), the payload's cipher, kernel mappings."""
