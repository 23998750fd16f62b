"""The payload of a LUKS2 device, ciphered in user space: AES in XTS or CBC, by libcrypto's EVP interface.

A sector's number is its byte offset in the payload divided by 512, whatever the sector size ("plain64" and "essiv" in
the kernel's dm-crypt documentation; LUKS2 leaves dm-crypt's iv_large_sectors off). So any range of whole sectors can
be done by itself. The IV is the number, little-endian; for ESSIV that encrypted under the key's SHA-256.

libcrypto is called through ctypes, in place. EVP_Cipher gets pointers that were made beforehand, and is not told its
arguments' types: to make three pointers of numbers for each sector costs more than the call. The calls keep the
interpreter's lock: for calls this short, dropping and taking it costs half as much again, and ranges are spread over
processes anyway (docs/decisions/002).
"""

import ctypes
import hashlib
from collections.abc import Iterator
from functools import cache
from typing import TypeAlias

from plugin.errors import EbiError, invalid, unsupported

XTS = "aes-xts-plain64"
_CBC, _ESSIV = "aes-cbc-plain64", "aes-cbc-essiv:sha256"
_CBC_SIZES = {128: "EVP_aes_128_cbc", 192: "EVP_aes_192_cbc", 256: "EVP_aes_256_cbc"}
# By cipher and bits of the volume key, which for XTS holds two keys: libcrypto's name.
_ALGORITHMS = {XTS: {256: "EVP_aes_128_xts", 512: "EVP_aes_256_xts"}, _CBC: _CBC_SIZES, _ESSIV: _CBC_SIZES}
_ECB = "EVP_aes_256_ecb"
_Pointer: TypeAlias = "ctypes._CArgObject"


def supports(cipher: str, key_size: int) -> bool:
    """Whether this module ciphers `cipher` with keys of `key_size` bits."""
    return key_size in _ALGORITHMS.get(cipher, {})


def check(cipher: str, key_size: int, owner: str = "") -> None:
    """Raise UNSUPPORTED about a cipher that `owner` has or shall have and `supports` denies."""
    if supports(cipher, key_size):
        return
    sizes = _ALGORITHMS.get(cipher)
    known = f"use {', '.join(_ALGORITHMS)}" if sizes is None else f"use {_either(sizes)} bits"
    with_key = "" if sizes is None else f" with a key of {key_size} bits"
    raise unsupported(f"nothing here can do the cipher {cipher}{with_key}{owner and f' for {owner}'}", known)


def _either(sizes: dict[int, str]) -> str:
    return " or ".join(str(size) for size in sizes)


class Cipher:
    """The cipher of one payload. Not for several threads at once.

    Raises UNSUPPORTED for a cipher that is not known here, INVALID for a key that can't be one.
    """

    def __init__(self, cipher: str, key: bytes, sector_size: int) -> None:
        bits = 8 * len(key)
        check(cipher, bits)
        if cipher == XTS and key[: len(key) // 2] == key[len(key) // 2 :]:
            raise invalid("a volume key whose halves are equal is none for XTS", "encrypt with a random key")
        self.sector_size = sector_size
        self._start = 0
        self._pointers: list[_Pointer] = []
        algorithm = _ALGORITHMS[cipher][bits]
        self._contexts = {encrypt: _Context(algorithm, key, encrypt=encrypt) for encrypt in (False, True)}
        self._essiv = _Context(_ECB, hashlib.sha256(key).digest(), encrypt=True) if cipher == _ESSIV else None

    def encrypt(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Encrypt `buffer`, whole sectors from byte `offset` of the payload on, in place."""
        self._run(self._contexts[True], buffer, offset)

    def decrypt(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Decrypt `buffer`, whole sectors from byte `offset` of the payload on, in place."""
        self._run(self._contexts[False], buffer, offset)

    def _run(self, context: "_Context", buffer: bytearray | memoryview, offset: int) -> None:
        size, length = self.sector_size, len(buffer)
        if length % size or offset % size:
            raise ValueError(f"{length} bytes at {offset} are not whole sectors of {size}")
        numbers = range(offset // 512, (offset + length) // 512, size // 512)
        sectors = self._sectors(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), length) if length else []
        handle, cipher, number = context.handle, context.lib.EVP_Cipher, context.number
        if number is not None:
            for number.value, sector in zip(numbers, sectors, strict=True):
                if cipher(handle, sector, sector, size) <= 0:
                    raise _failed()
            return
        init = context.lib.EVP_CipherInit_ex
        for iv, sector in zip(self._ivs(numbers), sectors, strict=True):
            init(handle, None, None, None, iv, -1)
            if cipher(handle, sector, sector, size) <= 0:
                raise _failed()

    def _sectors(self, start: int, length: int) -> "list[_Pointer]":
        """Pointers to the sectors of the buffer at address `start`; made anew only for another buffer."""
        before = start - self._start
        if before < 0 or before % self.sector_size or before + length > len(self._pointers) * self.sector_size:
            anchor = ctypes.c_char.from_address(start)
            self._start, before = start, 0
            self._pointers = [ctypes.byref(anchor, at) for at in range(0, length, self.sector_size)]
        return self._pointers[before // self.sector_size : (before + length) // self.sector_size]

    def _ivs(self, numbers: range) -> Iterator[bytes]:
        ivs = bytearray().join(number.to_bytes(16, "little") for number in numbers)
        if self._essiv and ivs:
            self._essiv.run(ivs)
        return (bytes(ivs[at : at + 16]) for at in range(0, len(ivs), 16))


class _Context:
    """An EVP_CIPHER_CTX with its key. `number`: where the sector's number is written to set the IV; None: nowhere.

    For XTS with a number of 64 bits and the rest of the IV zero that saves one call of two for each sector.
    """

    def __init__(self, algorithm: str, key: bytes, *, encrypt: bool) -> None:
        self.lib = _libcrypto()
        self._address: int = self.lib.EVP_CIPHER_CTX_new()
        self.handle = _pointer(self._address)
        found = getattr(self.lib, algorithm)()
        if self.lib.EVP_CipherInit_ex(self.handle, found, None, key, bytes(16), int(encrypt)) != 1:
            raise EbiError(f"libcrypto does not take a key for {algorithm}", hint="is it in FIPS mode?")
        self.number = self._number() if algorithm.endswith("_xts") else None

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.lib.EVP_CIPHER_CTX_free(self._address)  # it wipes the key

    def run(self, buffer: bytearray) -> None:
        """Cipher all of `buffer` in place, with the IV that is set."""
        place = ctypes.byref(ctypes.c_char.from_buffer(buffer))
        if self.lib.EVP_Cipher(self.handle, place, place, len(buffer)) <= 0:
            raise _failed()

    def _number(self) -> ctypes.c_uint64 | None:
        # EVP_CIPHER_CTX_iv_noconst(3) is deprecated and tells the place that today's providers read, so it is tried.
        if not hasattr(self.lib, "EVP_CIPHER_CTX_iv_noconst"):
            return None
        self.lib.EVP_CIPHER_CTX_iv_noconst.restype = ctypes.c_void_p
        pointer = self.lib.EVP_CIPHER_CTX_iv_noconst(self.handle)
        if not pointer:
            return None
        number, here, asked = ctypes.c_uint64.from_address(pointer), bytearray(32), bytearray(32)
        probe = 0x0123_4567_89AB_CDEF
        self.lib.EVP_CipherInit_ex(self.handle, None, None, None, probe.to_bytes(16, "little"), -1)
        self.run(asked)
        self.lib.EVP_CipherInit_ex(self.handle, None, None, None, bytes(16), -1)
        number.value = probe
        self.run(here)
        return number if here == asked else None


def _pointer(address: int) -> _Pointer:
    return ctypes.byref(ctypes.c_char.from_address(address))


def _failed() -> EbiError:
    return EbiError("libcrypto failed to cipher a sector", hint="is it in FIPS mode?")


@cache
def _libcrypto() -> ctypes.PyDLL:
    name = "libcrypto.so.3"
    try:
        lib = ctypes.PyDLL(name)
    except OSError:
        from ctypes.util import find_library  # noqa: PLC0415 - it loads a lot, and is hardly ever asked

        name = find_library("crypto") or name
        try:
            lib = ctypes.PyDLL(name)
        except OSError as error:
            raise unsupported(f"{name} is not there", "install OpenSSL 3 (Debian: libssl3)") from error
    pointer, number = ctypes.c_void_p, ctypes.c_int
    algorithms = {name for sizes in _ALGORITHMS.values() for name in sizes.values()}
    for function in ("EVP_CIPHER_CTX_new", _ECB, *algorithms):
        getattr(lib, function).argtypes = []
        getattr(lib, function).restype = pointer
    lib.EVP_CIPHER_CTX_free.argtypes = [pointer]
    lib.EVP_CIPHER_CTX_free.restype = None
    lib.EVP_CipherInit_ex.argtypes = [pointer, pointer, pointer, pointer, pointer, number]
    return lib
