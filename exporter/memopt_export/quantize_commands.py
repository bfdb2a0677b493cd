"""What `quantize` does: reads the graph and the data, makes one call, judges, and writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from memopt.errors import UsageError
from memopt.files import refuse_own_input, refuse_to_overwrite, sha256_file

if TYPE_CHECKING:
    from memopt_export.budget import Sensitivity
    from memopt_export.findings import Finding
    from memopt_export.graph import Graph
    from memopt_export.judge import Verdict
    from memopt_export.means import Means, Step
    from memopt_export.quantize import Quantized
    from memopt_export.recipe import Recipe, RecipeFile
    from memopt_models.data import Pictures, Samples

_JUDGED_SAMPLES = 512  # of the validation split, on which `quantize` compares with the float graph


@dataclass(frozen=True)
class QuantizeRequest:
    """What is asked of `quantize`. What is None or empty was not said: the recipe file says it, or the default holds.

    The first fields are those of `memopt_export.recipe.RecipeFile`, and go before what the file `recipe` says.
    """

    precision: str | None = None
    target: str | None = None
    data: str | None = None
    samples: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    calibration: str | None = None
    percentile: float | None = None
    correction: str | None = None
    equalize: bool | None = None
    weight_bits: int | None = None
    group_size: int | None = None
    convert_io: bool | None = None
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    recipe: Path | None = None
    save_recipe: Path | None = None
    max_drop: float | None = None  # percentage points of top-1
    min_sqnr: float | None = None  # dB
    sensitivity: bool = False
    memory_limit: int | None = None  # bytes
    external_data: bool = False
    measure: bool = True
    data_root: Path | None = None
    force: bool = False

    @property
    def needs_data(self) -> str | None:
        """The first option that means nothing without samples."""
        options = {
            "--max-drop": self.max_drop, "--min-sqnr": self.min_sqnr, "--sensitivity": self.sensitivity or None,
            "--memory-limit": self.memory_limit,
        }  # fmt: skip
        return next((name for name, value in options.items() if value is not None), None)


@dataclass(frozen=True)
class SavedQuantized:
    """A quantized graph on disk, held against the float one on samples that did not calibrate it.

    `recipe` is what made it: the layers that a budget kept in float are excluded in it. `holds` is None without one.
    `findings` are what costs bytes in it and need not; `unseen` says what could not be looked at.
    """

    path: str
    precision: str
    sha256: str
    recipe: RecipeFile
    calibrated: str | None
    kept_float: tuple[str, ...]
    notes: tuple[str, ...]
    verdict: Verdict
    ranking: tuple[Sensitivity, ...] = ()
    holds: bool | None = None
    reached: str | None = None
    recipe_path: str | None = None
    findings: tuple[Finding, ...] = ()
    unseen: tuple[str, ...] = ()

    def refusal(self, *, strict: bool) -> str | None:
        """Why the answer is no; None where it is yes. Flags count where one is strict."""
        if self.holds is False:
            return f"the budget does not hold: {self.reached}"
        return f"--strict: {'; '.join(self.verdict.flags)}" if strict and self.verdict.flags else None


def quantize(
    model: Path, output: Path, request: QuantizeRequest, *,
    on_step: Callable[[Step], None] | None = None, say: Callable[[str], None] | None = None,
) -> SavedQuantized:  # fmt: skip
    """A quantized graph, and the verdict on it on validation samples; `say` is told what memory it will need."""
    from memopt_export import inspection, judge
    from memopt_export.graph import load_graph, save_graph
    from memopt_export.means import Means
    from memopt_export.recipe import save_recipe
    from memopt_models.data import open_samples, stream_samples

    for path in filter(None, (output, request.save_recipe)):
        refuse_to_overwrite(path, force=request.force)
        refuse_own_input(path, [model])
    if output == request.save_recipe:
        raise UsageError(f"{output} is named twice", hint=f"--save-recipe {output.with_suffix('.toml')}")
    asked = _recipe_file(request)
    graph, calibration, judged = load_graph(model), None, None
    if asked.data is not None:
        given = partial(
            stream_samples, asked.data, inputs=graph.inputs, preprocess=graph.preprocess, root=request.data_root
        )
        calibration = given(split="train", at_most=asked.samples, seed=asked.seed)
        judged = open_samples(
            asked.data,
            split="validation",
            inputs=graph.inputs,
            preprocess=graph.preprocess,
            root=request.data_root,
            at_most=max(_JUDGED_SAMPLES, graph.fixed_batch or 0),
        )
    means = Means(asked.batch_size, on_step=on_step)
    made = _within_memory(request, _Making(graph, asked.recipe, calibration, judged, means), say)
    done = made.quantized.graph.with_seed(asked.seed)
    verdict = judge.judge(graph, replace(made.quantized, graph=done), made.recipe, judged, made.means)
    if request.measure:
        means.tell("measure, each graph in a process of its own", 0, 2)
        verdict = judge.measured(verdict, graph, done, made.recipe, judged)
    else:
        verdict = judge.unmeasured(verdict, "--no-measure")
    saved, told = replace(asked, recipe=made.recipe, batch_size=made.means.batch_size), done.quantization
    save_graph(done, output, force=request.force, external=request.external_data)
    if request.save_recipe is not None:
        save_recipe(saved, request.save_recipe, force=request.force)
    findings, unseen = inspection.look(output, source=model)
    return SavedQuantized(
        path=str(output),
        precision=done.precision,
        sha256=sha256_file(output),
        recipe=saved,
        calibrated=f"{told.samples} samples of {told.source}, seed {told.seed}" if told and told.source else None,
        kept_float=made.quantized.kept_float,
        notes=made.quantized.notes,
        verdict=verdict,
        ranking=made.ranking,
        holds=made.holds,
        reached=made.reached,
        recipe_path=str(request.save_recipe) if request.save_recipe else None,
        findings=findings,
        unseen=unseen,
    )


@dataclass(frozen=True, eq=False)
class _Making:
    """What a quantization starts from."""

    graph: Graph
    recipe: Recipe
    calibration: Samples | Pictures | None
    judged: Samples | None
    means: Means


@dataclass(frozen=True)
class _Made:
    """A quantized graph, the recipe and the means that made it in the end, and what a budget found on the way."""

    quantized: Quantized
    recipe: Recipe
    means: Means
    ranking: tuple[Sensitivity, ...] = ()
    holds: bool | None = None
    reached: str | None = None


def _recipe_file(request: QuantizeRequest) -> RecipeFile:
    """The recipe file, the defaults where there is none, with what the request says itself.

    Raises:
        InputRefused, UsageError: the file cannot be read, or something in it or in the request is not possible.
    """
    from memopt_export.recipe import RecipeFile, parse, read_recipe

    file = RecipeFile(parse(request.precision or "int8")) if request.recipe is None else read_recipe(request.recipe)
    own = {field.name for field in (*fields(file.recipe), *fields(file))} - {"recipe"}
    asked = file.changed({name: value for name, value in vars(request).items() if name in own})
    if request.percentile is not None and asked.recipe.calibration != "percentile":
        raise UsageError(
            f"--percentile means nothing to calibration {asked.recipe.calibration}", hint="--calibration percentile"
        )
    if asked.data is None and request.needs_data:
        raise UsageError(f"{request.needs_data} needs samples", hint="--data SPEC")
    return asked


def _within_memory(request: QuantizeRequest, making: _Making, say: Callable[[str], None] | None) -> _Made:
    """What `_within_budget` makes, in a process that is not allowed to hold more than the request says."""
    limit = request.memory_limit
    if limit is None:
        return _within_budget(request, making)
    from memopt_export import memory_limit

    need = memory_limit.estimate(making.graph, making.recipe, making.calibration, making.means)
    if say is not None:
        say(need.text())
    means = memory_limit.fit(making.graph, making.recipe, making.calibration, making.means, limit)
    with memory_limit.hard_cap(limit):
        return _within_budget(request, replace(making, means=means))


def _within_budget(request: QuantizeRequest, making: _Making) -> _Made:
    """The graph by the recipe, or by one that keeps as many layers in float as the request's budget wants."""
    from memopt_export import quantize as quantizing

    graph, recipe, calibration, means = making.graph, making.recipe, making.calibration, making.means
    judged = making.judged
    if request.max_drop is not None or request.min_sqnr is not None:
        from memopt_export.budget import Budget, within

        assert judged is not None  # a request that needs samples was refused without
        budget = Budget(request.max_drop, request.min_sqnr)
        kept = within(graph, recipe, calibration, judged, budget, means)
        return _Made(kept.quantized, kept.recipe, means, kept.ranking, kept.holds, kept.reached)
    ranking: tuple[Sensitivity, ...] = ()
    if request.sensitivity:
        from memopt_export.budget import rank

        assert judged is not None
        ranking = rank(graph, recipe, calibration, judged, means)
    return _Made(quantizing.quantize(graph, recipe, calibration, means), recipe, means, ranking)
