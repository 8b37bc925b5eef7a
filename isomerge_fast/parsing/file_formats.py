"""Recognise by its first bytes what a file is instead of weights: a Git LFS pointer, a web page, pickles, …"""

from __future__ import annotations

_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_POINTER_BYTES = 1_023  # the format's own limit
HEAD_BYTES = 64  # enough to recognise a format

PULL = "run git lfs pull in its folder"


def is_pointer(head: bytes) -> bool:
    """Return whether a file's first bytes are those of a Git LFS pointer, which stands in the place of a file."""
    return head.startswith(_POINTER)


def other_format(head: bytes) -> str | None:
    """Return what a file is instead of a safetensors file, and what to do; None where its first bytes do not tell."""
    if is_pointer(head):
        return f"a Git LFS pointer to one; {PULL}"
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        return "pickled weights under another name, which are never opened; save them as safetensors"
    if head.startswith(b"GGUF"):
        return "GGUF, which is not read; give the model's .safetensors files"
    if head.lstrip()[:1] == b"<":
        return "a web page; download it again, logged in where that is asked for"
    try:
        text = head.decode("ascii")
    except UnicodeDecodeError:
        return None
    is_text = all(character.isprintable() or character in "\t\r\n" for character in text)
    return f"a text that begins with {text.split(chr(10))[0].strip()!r}; download it again" if is_text else None
