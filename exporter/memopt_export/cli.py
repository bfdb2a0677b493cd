"""The command line, `memopt-export`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from memopt import __version__
from memopt.errors import AnswerIsNo, InputRefused, MemoptError, OutOfResource, UsageError, first_line, printable
from memopt.files import read_text
from memopt.gate import METRICS
from memopt_export import training_cli
from memopt_export.means import UNLIMITED
from memopt_export.options import (
    DATA_SPECS,
    PRECISION_NAMES,
    Batches,
    Command,
    Dimension,
    Size,
    as_json_option,
    compact_option,
    data_root_option,
    external_data_option,
    factory_option,
    force_option,
    key_option,
    output_option,
    passphrase_file_option,
    seed_option,
    trust_engines_option,
)
from memopt_export.recipe import CALIBRATIONS, CORRECTIONS

PROGRAM = "memopt-export"
_UNREACHABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)  # paths that someone typed


class _Shown(AnswerIsNo):
    """The answer is no, and the result that says so stands on stdout already."""


def _quantizing(command: Command) -> Command:
    """The options of `quantize` that say how. None has a default here: a recipe file may say it."""
    number, share = click.IntRange(min=1), click.FloatRange(min=0)
    for option in reversed((
        click.option("--precision", help=f"{', '.join(PRECISION_NAMES)}.  [default: int8]"),
        click.option("--target", help="cpu (ONNX Runtime) or tensorrt: which integers stand where.  [default: cpu]"),
        click.option("--data", help=f"Its train split calibrates, never invented; validation judges. {DATA_SPECS}"),
        click.option("--samples", type=number, help="How many calibrate, at most.  [default: 256]"),
        click.option("--seed", type=click.IntRange(min=0), help="Of the draw of the samples.  [default: 0]"),
        click.option("--batch-size", type=number, help=f"Samples in one run.  [default: {UNLIMITED.batch_size}]"),
        click.option("--calibration", help=f"Of ranges: {', '.join(CALIBRATIONS)}.  [default: mse]"),
        click.option("--percentile", type=float, help="For --calibration percentile, 50 to 100.  [default: 99.999]"),
        click.option("--correction", help=f"Of rounded weights: {', '.join(CORRECTIONS)}.  [default: gptq]"),
        click.option(
            "--equalize/--no-equalize", default=None,
            help="First make a float graph that computes the same and rounds better: similar ranges around zero, "
            "narrow tensors twice.  [default: equalize]",
        ),
        click.option("--weight-bits", type=int, help="Of integer layers: 8, or 7 without VNNI.  [default: 8]"),
        click.option(
            "--group-size", type=int,
            help="Inputs that share a scale in weight-only precisions; 0: a channel.  [default: 32 for int4, else 0]",
        ),
        click.option("--convert-io/--keep-io", default=None, help="fp16 and bf16: inputs and outputs too, or not."),
        click.option("--exclude", multiple=True, metavar="NAME", help="Node or operator that stays float; repeatable."),
        click.option("--include", multiple=True, metavar="NAME", help="Layer or operator; all others stay float."),
        click.option("--max-drop", type=share, metavar="PP", help="Keep layers float until top-1 drops by less."),
        click.option("--min-sqnr", type=float, metavar="DB", help="Keep layers float until the SQNR is at least this."),
        click.option("--sensitivity", is_flag=True, help="Rank the layers by what the result gains without each."),
        click.option("--memory-limit", type=Size(), metavar="SIZE", help="The process holds no more, such as 1GiB."),
        click.option("--recipe", type=click.Path(path_type=Path), help="TOML file that says all of the above."),
        click.option("--save-recipe", type=click.Path(path_type=Path), help="Write it, as it was used in the end."),
        external_data_option,
        click.option(
            "--no-measure", "measure", is_flag=True, flag_value=False, default=True,
            help="Skip latency and memory, which take two processes and some seconds.",
        ),
    )):  # fmt: skip
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Exports models and packs them for the edge; the result is memory.

    Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 the answer is no, 2 usage, 3 input
    refused, 4 integrity, 5 backend or device missing, 6 out of a resource, 70 a bug, 130 and 143 stopped by a signal.
    """


for _command in training_cli.COMMANDS:
    cli.add_command(_command)


@cli.command()
@click.argument("checkpoint")
@factory_option
@click.option("--data", help=f"Samples that prove parity; default: what it was trained on. {DATA_SPECS}")
@click.option("--samples", type=click.IntRange(min=2), default=64, show_default=True, help="How many prove parity.")
@click.option("--program", type=click.Path(path_type=Path), help="Also write torch's exported program, OUT.pt2.")
@compact_option
@click.option(
    "--views", type=int,
    help="Places that pictures are seen from, 1, 4 or 9; outputs are the mean. Takes as many times the time. "
    "Default: as many as it was trained for.",
)  # fmt: skip
@click.option("--uint8-input", "uint8", is_flag=True, help="Take pictures as they are; normalize inside.")
@output_option
@data_root_option
@force_option
@as_json_option
def export(
    checkpoint: str, network: str | None, data: str | None, samples: int, program: Path | None, compact: bool,
    views: int | None, uint8: bool, output: Path, data_root: Path | None, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Bring CHECKPOINT, or the module that pkg.mod:factory makes, to ONNX, and prove parity with torch."""
    from memopt_export import commands, console

    saved = commands.export(
        checkpoint, data, output,
        network=network, samples=samples, program=program, compact=compact, views=views, uint8=uint8,
        data_root=data_root, force=force,
    )  # fmt: skip
    console.show(saved, as_json=as_json)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@external_data_option
@compact_option
@output_option
@force_option
@as_json_option
def simplify(model: Path, external_data: bool, compact: bool, output: Path, force: bool, as_json: bool) -> None:
    """Store MODEL, an .onnx file, without what it does not need; it computes the same.

    Notes of the exporter, repeated and unread weights, Constant and Identity nodes go; BatchNorms are folded into
    convolutions; weights are stored raw, so that they can be mapped.
    """
    from memopt_export import commands, console

    saved = commands.simplify(model, output, external=external_data, compact=compact, force=force)
    console.show(saved, as_json=as_json)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@_quantizing
@click.option("--strict", is_flag=True, help="Exit with 1 where the result is flagged; it is written all the same.")
@output_option
@data_root_option
@force_option
@as_json_option
def quantize(model: Path, output: Path, strict: bool, as_json: bool, **asked: Any) -> None:
    """Quantize MODEL, an .onnx file, and hold the result against it on data that calibrated nothing.

    What is slower than the float graph, larger in private memory or on disk, below 10 dB, or mostly unfused is flagged.
    """
    from memopt_export import console, quantize_commands

    with console.quantizing() as listener:
        saved = quantize_commands.quantize(
            model, output, quantize_commands.QuantizeRequest(**asked), on_step=listener.on_step, say=listener.say
        )
    console.show(saved, as_json=as_json)
    refusal = saved.refusal(strict=strict)
    if refusal is not None:
        raise _Shown(refusal)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--flavor", default="tensorrt-rtx", show_default=True, help="tensorrt-rtx (builds without a GPU) or tensorrt."
)
@click.option("--target", default="sm75,sm80,sm86,sm89,sm120", show_default=True, help="GPU generations, or local.")
@click.option(
    "--batch", "batches", type=Batches(), multiple=True, default=((1, 1, 1), (2, 8, 32)), show_default="1 and 2,8,32",
    help="A profile: one batch, or MIN,OPT,MAX; may be given several times.",
)  # fmt: skip
@click.option(
    "--weight-streaming", is_flag=True,
    help="Weights may stay in host memory and come to the GPU layer by layer: profile minimum does so, slower.",
)  # fmt: skip
@click.option(
    "--timeout", "timeout_s", type=float, default=600.0, show_default=True, help="Seconds the build may take."
)
@output_option
@force_option
@as_json_option
def engine(
    model: Path, flavor: str, target: str, batches: Sequence[tuple[int, ...]], weight_streaming: bool,
    timeout_s: float, output: Path, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Build a TensorRT engine from MODEL, an .onnx file; writes OUT.engine and OUT.engine.json."""
    from memopt_export import commands, console

    profiles = [_profile(batch) for batch in batches]
    saved = commands.engine(
        model, flavor, [name.strip() for name in target.split(",")], profiles, output,
        weight_streaming=weight_streaming, force=force, timeout_s=timeout_s,
    )  # fmt: skip
    console.show(saved, as_json=as_json)
    if saved.path is None:
        raise _Shown(f"no target can take {model}: " + "; ".join(f"{k}: {v}" for k, v in saved.refused.items()))


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--batch", type=Batches(), default="1", show_default=True, help="Batches to plan, such as 1,8,32.")
@click.option("--budget", type=Size(), help="Find the largest batch within this size, such as 64MiB.")
@click.option("--dim", "dims", type=Dimension(), multiple=True, help="A free dimension, such as sequence=128. Repeat.")
@click.option("--svg", type=click.Path(path_type=Path), help="Draw the first plan: memory over the order of execution.")
@click.option("--measure", is_flag=True, help="Hold it against runs on zeros at the smallest and largest batch.")
@click.option("--reorder", type=click.Path(path_type=Path), help="Save the graph in an order that needs less, if any.")
@force_option
@as_json_option
def plan(
    model: Path, batch: tuple[int, ...], budget: int | None, dims: Sequence[tuple[str, int]], svg: Path | None,
    measure: bool, reorder: Path | None, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Plan the memory of MODEL, without running it.

    An .onnx file is planned as ONNX Runtime executes it here; an engine and a bundle tell what they were built with.
    """
    from memopt.compare import is_bundle
    from memopt_export import commands, console

    if model.suffix == ".engine" or is_bundle(model):
        if dims or measure or svg is not None or reorder is not None:
            raise UsageError(
                "--dim, --svg, --measure and --reorder are for graphs", hint="memopt-export plan MODEL.onnx"
            )
        needs = commands.needs(model, batch, budget)
        console.show(needs, as_json=as_json)
        if not needs.fits:
            raise _Shown(f"nothing in {model} is known to fit into the budget")
        return
    plans = commands.plan(
        model, batch, budget, dims=dict(dims), svg=svg, reordered=reorder, measure=measure, force=force
    )
    console.show(plans, as_json=as_json)
    if not plans.fits:
        raise _Shown(f"{model} does not fit into the budget at batch 1")
    if reorder is not None and plans.reordered is None:
        raise _Shown(f"no order of {model} is known that needs less; {reorder} is not written")


@cli.command()
@click.argument("artifacts", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--data", default="digits", show_default=True, help=f"Its test split judges accuracy. {DATA_SPECS}")
@click.option("--batch", "batches", type=Batches(), default="1,32", show_default=True, help="Such as 1,8,32.")
@click.option("--runtimes", help="Such as torch,onnxruntime; default: every one that opens the artifact.")
@click.option("--devices", default="cpu,cuda", show_default=True, help="Devices to use where they work.")
@click.option("--reference", help="Name of the artifact the others are held against; default: the first that runs.")
@click.option("--samples", type=click.IntRange(min=1), help="How many test samples; default: all.")
@click.option("--metric", metavar="PKG.MOD:FUNCTION", help="Of yours: (outputs, labels) to a number, more is better.")
@click.option("--confusion", is_flag=True, help="Count the answers given for each label; in --json and --html.")
@click.option("--soak", type=click.IntRange(min=56), metavar="RUNS", help="Watch memory over so many runs, for leaks.")
@click.option("--against", type=click.Path(path_type=Path), metavar="BASE.json", help="Exit with 1 where it got worse.")
@click.option(
    "--tolerance", "tolerances", multiple=True, metavar="[METRIC=]AMOUNT",
    help=f"By how much it may: 10%, private=5%, p50=off, ... repeatable. Of {', '.join(METRICS)}.",
)  # fmt: skip
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with table and pictures.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@trust_engines_option
@seed_option
@data_root_option
@force_option
@as_json_option
def compare(artifacts: Sequence[Path], markdown: bool, as_json: bool, **asked: Any) -> None:
    """Compare memory, accuracy and latency of ARTIFACTS (.onnx, .engine, .pt2, .mopt), each in a fresh process.

    One that cannot be measured keeps a row with the reason. --against holds the result against an earlier --json: for
    each metric a share (of what it was) or an amount is tolerated; what is below a floor, such as 1 MiB, never counts.
    """
    from memopt_export import commands, console

    asked |= {"runtimes": _names(asked["runtimes"]), "devices": _names(asked["devices"])}
    with console.measuring() as listener:
        report = commands.compare_files(artifacts, commands.CompareRequest(**asked), listener)
    if markdown and not as_json:
        click.echo(report.to_markdown())
    else:
        console.show(report, as_json=as_json)
    if all(row.reason is not None for row in report.rows):
        raise _Shown("nothing could be measured")
    if report.gate is not None and not report.gate.passed:
        raise _Shown(report.gate.refusal())


@cli.command()
@click.argument("parts", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--format",
    "form",
    type=click.Choice(["mopt", "dir", "triton", "ort"]),
    default="mopt",
    show_default=True,
    help="A bundle as one file or a folder; a model repository of Triton; a model package of ONNX Runtime.",
)
@click.option(
    "--specialize",
    type=click.Choice(["local"]),
    help="Put beside each graph one that is optimized for this processor, and used only on its like.",
)
@click.option("--name", help="Of the bundle; default: the output's.")
@click.option("--data", help=f"Gives labels, preprocessing and golden samples. {DATA_SPECS}")
@click.option(
    "--labels", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Text file, one label a line."
)
@click.option("--license", "license_id", metavar="SPDX", help="Licence of the model, such as Apache-2.0.")
@click.option(
    "--license-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Its text; that of Apache-2.0 is at hand.",
)
@click.option("--sign", type=click.Path(path_type=Path), metavar="KEY", help="Sign with this private key.")
@passphrase_file_option
@output_option
@data_root_option
@force_option
@as_json_option
def pack(
    parts: Sequence[Path], form: str, specialize: str | None, name: str | None, data: str | None, labels: Path | None,
    license_id: str | None, license_file: Path | None,
    sign: Path | None, passphrase_file: Path | None, output: Path, data_root: Path | None, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Pack PARTS (.onnx, and .engine files built from them) into a bundle; the first graph is the reference."""
    from memopt_export import bundle_commands, console

    packed = bundle_commands.pack(
        parts, output, form=form, name=name, data=data, labels=labels, license_id=license_id,
        license_file=license_file, sign=sign, specialized=specialize is not None,
        passphrase=_passphrase(passphrase_file) if sign else None, force=force, data_root=data_root,
    )  # fmt: skip
    console.show(packed, as_json=as_json)


@cli.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Private key; KEY.pub is beside.")
@passphrase_file_option
@force_option
@as_json_option
def keygen(output: Path, passphrase_file: Path | None, force: bool, as_json: bool) -> None:
    """Make a pair of ed25519 keys: the private one signs bundles, the public one is given to those who check."""
    from memopt_export import bundle_commands, console

    console.show(bundle_commands.keygen(output, _passphrase(passphrase_file), force=force), as_json=as_json)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("pictures", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--device", default="auto", show_default=True, help="auto, tensorrt, cuda or cpu.")
@click.option("--variant", help="The variant to run; default: chosen by memory and accuracy.")
@click.option("--memory-limit", help="Private memory the model may hold, such as 64MiB.")
@click.option("--topk", type=click.IntRange(min=1), default=3, show_default=True, help="Classes of each picture.")
@key_option
@trust_engines_option
@as_json_option
def run(
    bundle: Path, pictures: Sequence[Path], device: str, variant: str | None, memory_limit: str | None, topk: int,
    keys: Sequence[Path], trust_engines: bool, as_json: bool,
) -> None:  # fmt: skip
    """Classify PICTURES with BUNDLE, by the embedded runtime.

    The first run has the graph optimized for this processor, for later ones, in $MEMOPT_CACHE ("off": not at all).
    """
    from memopt_export import bundle_commands, console

    found = bundle_commands.run(
        bundle, pictures, device=device, variant=variant, memory_limit=memory_limit, topk=topk, trusted_keys=keys,
        trust_engines=trust_engines,
    )  # fmt: skip
    console.show(found, as_json=as_json)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@as_json_option
def inspect(path: Path, as_json: bool) -> None:
    """Tell what PATH holds, without running it: .onnx, .engine, .safetensors, .mopt, or a folder that `pack` wrote.

    Of graphs also what costs bytes and need not: what ONNX Runtime leaves unfused or unpacks, weights stored badly,
    twice, or pruned to zeros; each with a remedy.
    """
    from memopt_export import console, inspection

    console.show(inspection.inspect(path), as_json=as_json)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--run", "replay", is_flag=True, help="Replay the golden outputs on every runtime of this machine.")
@key_option
@click.option("--require-signature", is_flag=True, help="Refuse to answer without a --key: for scripts.")
@trust_engines_option
@as_json_option
def verify(
    bundle: Path, replay: bool, keys: Sequence[Path], require_signature: bool, trust_engines: bool, as_json: bool
) -> None:
    """Check structure and digests of BUNDLE, and with --key its signature."""
    from memopt_export import bundle_commands, console

    if require_signature and not keys:
        raise UsageError("--require-signature without a key proves nothing", hint="--key KEY.pub")
    verification = bundle_commands.verify(bundle, replay=replay, trusted_keys=keys, trust_engines=trust_engines)
    console.show(verification, as_json=as_json)
    if not verification.holds:
        raise _Shown(f"{bundle} gives other outputs here than when it was packed")


@cli.command()
@as_json_option
def doctor(as_json: bool) -> None:
    """Tell which runtimes and providers really work here, and why another does not."""
    from memopt_export import commands, console

    console.show(commands.doctor(), as_json=as_json)


@cli.command()
@click.argument("recipe", default="digits")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Finished stages; default build/NAME.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle; default dist/NAME.mopt.")
@data_root_option
@as_json_option
def pipeline(recipe: str, work: Path | None, output: Path | None, data_root: Path | None, as_json: bool) -> None:
    """Run RECIPE (digits, mnist, or a TOML file): from training data to a packed, measured bundle.

    A stage is made again only when its inputs, options or tools changed. The bundle and the report beside it belong
    to the pipeline and are replaced.
    """
    from memopt_export import commands, console

    with console.pipeline() as listener:
        result = commands.pipeline(
            recipe, work=work, output=output, data_root=data_root,
            on_start=listener.on_start, on_done=listener.on_done, on_progress=listener.on_progress,
        )  # fmt: skip
    console.show(result, as_json=as_json)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and leaves with the documented exit code."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))


class _Terminated(BaseException):
    """SIGTERM: unwinds like a KeyboardInterrupt, so that temporary files go."""


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _run(arguments: list[str]) -> int:
    try:
        cli.main(arguments, prog_name=PROGRAM, standalone_mode=False, obj=tuple(arguments))
        sys.stdout.flush()
    except _Shown as error:
        return _tell([], error.problem, error.hint, error.exit_code)
    except MemoptError as error:
        return _tell(arguments, error.problem, error.hint, error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return UsageError.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"{context.command_path if context else PROGRAM} --help"
        return _tell(arguments, error.format_message(), hint, UsageError.exit_code)
    except (MemoryError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if isinstance(error, OSError) and error.errno in _UNREACHABLE and error.filename is not None:
            return _tell(arguments, f"{error.filename}: {error.strerror}", None, InputRefused.exit_code)
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _tell_bug(arguments, error)
        return _tell(arguments, f"out of memory or disk: {first_line(error)}", None, OutOfResource.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _tell(arguments, "interrupted", None, 130)
    except _Terminated:
        return _tell(arguments, "terminated", None, 143)
    except Exception as error:  # noqa: BLE001  # the last line of defence: a bug keeps its traceback and gets its code
        return _tell_bug(arguments, error)
    return 0


def _tell_bug(arguments: Sequence[str], error: Exception) -> int:
    sys.excepthook(type(error), error, error.__traceback__)
    return _tell(arguments, f"this is a bug of memopt: {error!r}", None, MemoptError.exit_code)


def _tell(arguments: Sequence[str], problem: str, hint: str | None, code: int) -> int:
    """One line on stderr, with control characters made visible; with --json, the same as a document on stdout."""
    line = " ".join(problem.split()) + (f"; hint: {hint}" if hint else "")
    click.echo(f"{PROGRAM}: error: {printable(line)}", err=True)
    if "--json" in arguments:
        from memopt.strict_json import to_json

        error = {"problem": problem, "exit_code": code} | ({"hint": hint} if hint else {})
        click.echo(to_json({"error": error}))
    return code


def _passphrase(file: Path | None) -> str | None:
    """From the file, else from the environment, never from the command line, which every process can read."""
    if file is None:
        return os.environ.get("MEMOPT_PASSPHRASE")
    return read_text(file).removesuffix("\n")


def _profile(batch: Sequence[int]) -> tuple[int, int, int]:
    if len(batch) == 1:
        return batch[0], batch[0], batch[0]
    if len(batch) == 3:
        return batch[0], batch[1], batch[2]
    raise UsageError(f"--batch {','.join(map(str, batch))} is no profile", hint="--batch 8, or --batch MIN,OPT,MAX")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()
