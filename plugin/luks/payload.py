"""The payload of a LUKS2 device, ciphered in user space: AES-XTS by libcrypto's EVP interface.

The IV of a sector is its byte offset in the payload divided by 512, little-endian, whatever the sector size
("plain64" in the kernel's dm-crypt documentation). So any range of whole sectors can be done by itself.

libcrypto is called through ctypes, two calls a sector, in place. The calls keep the interpreter's lock: for calls this
short, dropping and taking it costs half as much again, and ranges are spread over processes anyway.
"""

import ctypes
import ctypes.util
from functools import cache

from plugin.errors import EbiError, invalid, unsupported

XTS = "aes-xts-plain64"
_KEY_SIZES = {32: "EVP_aes_128_xts", 64: "EVP_aes_256_xts"}  # bytes of both keys together


def supports(cipher: str, key_size: int) -> bool:
    """Whether this module ciphers `cipher` with keys of `key_size` bits."""
    return cipher == XTS and key_size // 8 in _KEY_SIZES


class Cipher:
    """The cipher of one payload. Not for several threads at once.

    Raises UNSUPPORTED for a cipher that is not known here, INVALID for a key that can't be one.
    """

    def __init__(self, cipher: str, key: bytes, sector_size: int) -> None:
        if not supports(cipher, 8 * len(key)):
            raise unsupported(
                f"nothing here can do the cipher {cipher} with a key of {8 * len(key)} bits",
                f"use {XTS} with a key of 256 or 512 bits",
            )
        if key[: len(key) // 2] == key[len(key) // 2 :]:
            raise invalid("a volume key whose halves are equal is none for XTS", "encrypt with a random key")
        self.sector_size = sector_size
        self._lib = _libcrypto()
        algorithm = getattr(self._lib, _KEY_SIZES[len(key)])()
        self._contexts = {encrypt: self._lib.EVP_CIPHER_CTX_new() for encrypt in (False, True)}
        for encrypt, context in self._contexts.items():
            if self._lib.EVP_CipherInit_ex(context, algorithm, None, key, bytes(16), int(encrypt)) != 1:
                raise EbiError(f"libcrypto does not take a key for {cipher}", hint="is it in FIPS mode?")

    def __del__(self) -> None:
        for context in getattr(self, "_contexts", {}).values():
            self._lib.EVP_CIPHER_CTX_free(context)  # it wipes the key

    def encrypt(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Encrypt `buffer`, whole sectors from byte `offset` of the payload on, in place."""
        self._run(self._contexts[True], self._lib.EVP_EncryptInit_ex, self._lib.EVP_EncryptUpdate, buffer, offset)

    def decrypt(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Decrypt `buffer`, whole sectors from byte `offset` of the payload on, in place."""
        self._run(self._contexts[False], self._lib.EVP_DecryptInit_ex, self._lib.EVP_DecryptUpdate, buffer, offset)

    def _run(
        self, context: int, init: "ctypes._NamedFuncPointer", update: "ctypes._NamedFuncPointer",
        buffer: bytearray | memoryview, offset: int,
    ) -> None:  # fmt: skip
        size, length = self.sector_size, len(buffer)
        if length % size or offset % size:
            raise ValueError(f"{length} bytes at {offset} are not whole sectors of {size}")
        start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        written = ctypes.c_int()
        pointer = ctypes.byref(written)
        sector, step = offset // 512, size // 512
        for address in range(start, start + length, size):
            init(context, None, None, None, sector.to_bytes(16, "little"))
            if update(context, address, pointer, address, size) != 1:
                raise EbiError("libcrypto failed to cipher a sector", hint="is it in FIPS mode?")
            sector += step


@cache
def _libcrypto() -> ctypes.PyDLL:
    name = "libcrypto.so.3"
    try:
        lib = ctypes.PyDLL(name)
    except OSError:
        name = ctypes.util.find_library("crypto") or name
        try:
            lib = ctypes.PyDLL(name)
        except OSError as error:
            raise unsupported(f"{name} is not there", "install OpenSSL 3 (Debian: libssl3)") from error
    pointer, number = ctypes.c_void_p, ctypes.c_int
    for function in ("EVP_CIPHER_CTX_new", *_KEY_SIZES.values()):
        getattr(lib, function).argtypes = []
        getattr(lib, function).restype = pointer
    lib.EVP_CIPHER_CTX_free.argtypes = [pointer]
    lib.EVP_CIPHER_CTX_free.restype = None
    lib.EVP_CipherInit_ex.argtypes = [pointer, pointer, pointer, pointer, pointer, number]
    for way in ("Encrypt", "Decrypt"):
        getattr(lib, f"EVP_{way}Init_ex").argtypes = [pointer] * 5
        getattr(lib, f"EVP_{way}Update").argtypes = [pointer, pointer, pointer, pointer, number]
    return lib
