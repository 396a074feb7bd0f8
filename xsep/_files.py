"""Files that processes share, and files that must not be lost."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where this package keeps what it has found out about a machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xsep"


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file, or raises ``OSError``; who reads it then or meanwhile finds the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """``write_bytes`` of a value as JSON."""
    write_bytes(path, json.dumps(value, indent=1).encode())
