"""What of a check goes into the manifest.

In: an engine's check, and the bundle as it was opened for it. Out: why it is not kept, or the manifest with it. Kept is

- a failure, in whichever levels were asked for, unless the check was given other sources than the bundle was exported
  from: then it says nothing about the engine;
- a pass where every level ran that needs no further files (all but `questions`), over at least `MIN_NEW_TOKENS` greedy
  tokens, and over a prompt that is fused, if anything can be: with less, nothing is proved.
"""

from c2c_export.bundle import Bundle, EngineRecord, Manifest, engine_prefix, read_manifest, write_manifest
from c2c_export.bundle_lock import locked
from c2c_export.check.level import CheckContext
from c2c_export.check.levels.sources import other_files
from c2c_export.check_record import LEVELS, CheckRecord, LevelName
from c2c_export.errors import C2CError
from engines.select import ORT_CUDA

MIN_NEW_TOKENS = 16
"""Of the level `generation`, for a pass to be kept."""
_MANDATORY: frozenset[LevelName] = frozenset(LEVELS) - {"questions"}
_ENGINES_READ = ("graphs/", "tokenizers/", "alignment/")


def why_not_kept(context: CheckContext, check: CheckRecord) -> str | None:
    """Why the result does not go into the manifest; None if it does."""
    others = other_files(context)
    from_sources = [found for level in check.levels if level.name == "sources" for found in level.divergences]
    if others and all(found in others for found in from_sources):
        return f"other sources were given than the bundle was exported from: {others[0].message}"
    if not check.passed:
        return None
    missing = sorted(_MANDATORY - {level.name for level in check.levels})
    if missing:
        return f"an engine has passed when {', '.join(missing)} ran too"
    if context.options.new_tokens < MIN_NEW_TOKENS:
        return f"an engine has passed when at least {MIN_NEW_TOKENS} tokens were generated (--new-tokens)"
    if not _is_anything_fused(context):
        return "an engine has passed when a prompt was fused, and none of --prompts is: give a longer one"
    return None


def keep_check(bundle: Bundle, name: str, checked: EngineRecord, check: CheckRecord) -> None:
    """Put the result into the manifest of `bundle`, which is as it was opened for the check, and nothing else.

    Raises `C2CError` when the engine was built again or removed since, or anything that it runs on was changed.
    """
    with locked(bundle.root):
        manifest = read_manifest(bundle.root)  # another process may have changed it meanwhile
        present = manifest.engines.get(name)
        if present is None and checked.target == ORT_CUDA and checked.build is None:
            present = checked  # the portable graphs, which nobody builds
        if (
            present is None
            or present.model_copy(update={"check": None}) != checked.model_copy(update={"check": None})
            or _read_by(manifest, name) != _read_by(bundle.manifest, name)
        ):
            raise C2CError(
                f"{bundle.root}: engine {name} was built or exported again while it was checked; check it again"
            )
        engines = {**manifest.engines, name: present.model_copy(update={"check": check})}
        write_manifest(bundle.root, manifest.model_copy(update={"engines": engines}))


def _read_by(manifest: Manifest, name: str) -> Manifest:
    """What of the manifest a check of that engine is about: all but other engines, with the files that it reads."""
    prefixes = (*_ENGINES_READ, engine_prefix(name))
    files = {path: digest for path, digest in manifest.files.items() if path.startswith(prefixes)}
    return manifest.model_copy(update={"engines": {}, "files": files})


def _is_anything_fused(context: CheckContext) -> bool:
    """Whether some prompt has a fused section, or no fuser has anything to do."""
    if not any(name.startswith("fuser") for name in context.record.graphs):
        return True
    plans = [context.engine.plan(prompt) for prompt in context.prompts]
    return any(section.fused for plan in plans for section in plan.sections)
