"""What `pack --format` writes: the two forms of our own bundle, and formats of others."""

from __future__ import annotations

from pathlib import Path

from memopt.errors import UsageError
from memopt_export.ort_package import write_package
from memopt_export.pack import FORMS, Contents, Written, pack
from memopt_export.signing import SigningKey
from memopt_export.triton import write_repository

FOREIGN = {"triton": write_repository, "ort": write_package}
FORMATS = (*FORMS, *FOREIGN)


def write(
    form: str, contents: Contents, output: Path, *, sign: SigningKey | None = None, force: bool = False
) -> Written:
    """Writes the contents in one of FORMATS.

    Raises:
        UsageError: the output exists, or a format that knows no signatures is to be signed.
        InputRefused: the parts do not belong together, or the format cannot express them.
    """
    if form in FORMS:
        manifest = pack(contents, output, form=form, sign=sign, force=force)
        return Written(tuple(variant.id for variant in manifest.variants), len(manifest.files))
    if sign is not None:
        raise UsageError(f"--format {form} has no signatures, only a bundle has", hint="--format mopt")
    return FOREIGN[form](contents, output, force=force)
