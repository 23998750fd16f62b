"""`python -m csi.generate [DIRECTORY]`: the stubs in csi/stubs, made from proto/."""

import re
import sys
from importlib import resources
from pathlib import Path

_ROOT = Path(__file__).parents[1]
STUBS = _ROOT / "csi" / "stubs"
FILES = ("csi", "health", "registration")


def generate(target: Path) -> None:
    """Write the stubs of every file in proto/ into `target`. Needs grpcio-tools."""
    from grpc_tools import protoc

    target.mkdir(parents=True, exist_ok=True)
    own = str(resources.files("grpc_tools") / "_proto")
    out = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    names = [f"{name}.proto" for name in FILES]
    if protoc.main(["protoc", f"-I{_ROOT / 'proto'}", f"-I{own}", *out, *names]) != 0:
        raise SystemExit("protoc failed")
    (target / "__init__.py").write_text('"""Generated from proto/ by `python -m csi.generate`."""\n')
    for name in FILES:
        # protoc writes imports for a flat path; ours is a package.
        file = target / f"{name}_pb2_grpc.py"
        file.write_text(
            re.sub(rf"^import {name}_pb2 as", f"from csi.stubs import {name}_pb2 as", file.read_text(), flags=re.M)
        )


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else STUBS)
