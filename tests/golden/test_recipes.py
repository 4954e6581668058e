"""Every recipe, resolved, is reviewed text; and its shape is the published one.

After a wanted change write the texts anew, and read the difference:

    pytest tests/golden/test_recipes.py --write-golden
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from llamax.cli.plan import main
from llamax.config.hardware import Machine, load_machine
from llamax.config.load import RECIPES, dump_config, load_config, recipes
from llamax.config.validate import accumulation
from llamax.runtime.units import show_bytes, show_number
from llamax.tools.plan import Plan, plan, search
from llamax.tools.plan.nearest import flags

GOLDEN = Path(__file__).parent / "recipes"

# recipe: (ranks of its mesh, published number of parameters)
PUBLISHED = {
    "demo": (4, 3_196_608),
    "dolly-llama2-7b": (32, 6_738_415_616),
    "dolly-llama3.1-8b": (8, 8_030_261_248),
    "finetune-demo": (4, 3_196_608),
    "gsm8k-lora": (2, 1_235_814_400),
    "korean-chat-lora": (1, 6_738_415_616),
    "korean-chat-qlora": (1, 6_738_415_616),
    "korean-chat-qlora-24gb": (1, 6_738_415_616),
    "news-llama3-8b-qlora": (2 * 4, 8_030_261_248),
    "llama2-7b": (4 * 32, 6_738_415_616),
    "llama2-13b": (8 * 32, 13_015_864_320),
    "llama2-70b": (32 * 32, 68_976_648_192),
    "llama3-8b": (8 * 32, 8_030_261_248),
    "llama3.1-8b": (32 * 32, 8_030_261_248),
    "llama3.1-8b-128k": (32 * 32, 8_030_261_248),
    "llama3.1-70b": (32 * 32, 70_553_706_496),
    "llama3.1-70b-trn1": (32 * 32, 70_553_706_496),
    "llama3.2-1b": (32, 1_235_814_400),
    "llama3.2-3b": (4 * 32, 3_212_749_824),
    "tinyllama-1.1b": (32, 1_100_048_384),
}


def test_every_recipe_is_checked() -> None:
    assert recipes() == sorted(PUBLISHED) == sorted(path.stem for path in GOLDEN.glob("*.toml"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_resolves_to_the_reviewed_text(
    name: str, compare_golden: Callable[[Path, str], None]
) -> None:
    config = load_config(name, world_size=PUBLISHED[name][0])
    compare_golden(GOLDEN / f"{name}.toml", dump_config(config))
    assert load_config(str(GOLDEN / f"{name}.toml")) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_size(name: str) -> None:
    model = load_config(name).model
    assert model.num_parameters() == PUBLISHED[name][1]
    assert f"{model.num_parameters():,} parameters" in (RECIPES / f"{name}.toml").read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_comments_of_a_recipe_are_true(name: str) -> None:
    config, (world, _) = load_config(name), PUBLISHED[name]
    text = (RECIPES / f"{name}.toml").read_text()
    tensor = config.parallel.tensor
    context = config.parallel.context
    pipeline = config.parallel.pipeline
    data = world // (tensor * context * pipeline)
    length, batch = config.data.sequence_length, config.data.global_batch
    cut = f" x context {context}" if context > 1 else ""
    cut += f" x pipeline {pipeline}" if pipeline > 1 else ""
    assert f"Mesh:      tensor {tensor}{cut} x data {data}" in text
    assert f"Step:      {batch} x {length} = {batch * length:,} tokens" in text
    total = re.sub(r"e\+0?", "e", f"{config.run.steps * batch * length:.1e}")
    if config.run.epochs:
        assert f"; {config.run.epochs} epochs.\n" in text
    else:
        assert f"; {config.run.steps:,} steps are {total} tokens" in text
    assert f"-m llamax.train --config {name}\n" in text
    started = re.search(r"(?:--nnodes (\d+) )?--nproc-per-node (\d+)", text)
    assert started
    assert int(started[1] or 1) * int(started[2]) == world
    if counted := re.search(r"(\d+) microsteps", text):
        assert int(counted[1]) == accumulation(config, data)


def comment(name: str) -> str:
    """The comment that a recipe begins with, in one line."""
    text = (RECIPES / f"{name}.toml").read_text()
    return " ".join(text[: text.index("\n\n")].replace("\n#", " ").split())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_fits_the_machine_it_names(name: str) -> None:
    found = re.search(r"on (\d+) (trn\w+\.\w+) node", comment(name))
    if found is None:
        pytest.skip("it names no Trainium")
    assert main(["--config", name, "--nodes", found[1], "--instance", found[2]]) == 0


def test_the_recipe_of_a_small_card_fits_it() -> None:
    """With a fifth to spare, and with the state of the adapters in 64 GiB of host memory."""
    planned = plan(load_config("korean-chat-qlora-24gb"), load_machine("rtx3090"), 1)
    assert planned.memory.peak < 0.8 * planned.memory.available
    assert planned.memory.fits
    adapters = 159_907_840  # rank 64 on the seven projections of 32 layers
    assert planned.memory.host.value == (4 + 8) * adapters


# These keep the mesh of a tutorial that runs are compared with; the others are pretraining runs.
TUTORIALS = ("dolly-", "finetune-", "gsm8k-", "korean-", "news-")
SLOWER = 0.97  # of the fastest layout, at least


@cache
def machine_of(name: str) -> tuple[Machine, int] | None:
    """The Trainium and the number of nodes that a recipe is for, or None."""
    found = re.search(r" Mesh: .*? on (\d+) (trn\w+\.\w+) node", comment(name))
    return (load_machine(found[2]), int(found[1])) if found else None


@cache
def layouts(name: str) -> list[Plan]:
    machine, nodes = machine_of(name) or pytest.skip("it names no Trainium")
    return search(load_config(name), machine, nodes)[0]


def speed(planned: Plan) -> str:
    return show_number(planned.time.tokens_per_s)


def network_s(planned: Plan) -> float:
    """The seconds of a step in which a layout waits for the network between nodes."""
    return sum(line.value for line in planned.time.lines if " over network" in line.formula)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.startswith(TUTORIALS)])
def test_a_recipe_takes_the_best_layout_or_a_plainer_one_as_fast(name: str) -> None:
    """The rule of docs/reference/recipes.md."""
    machine, nodes = machine_of(name) or pytest.skip("it names no Trainium")
    mine = plan(name, machine, nodes)
    assert mine.memory.fits
    assert not mine.risks
    tried = [each for each in layouts(name) if each.memory.fits and not each.risks]
    fastest = tried[0].time.tokens_per_s
    assert mine.time.tokens_per_s >= SLOWER * fastest
    alike = [each for each in tried if each.time.tokens_per_s >= SLOWER * fastest]
    plain = [each for each in alike if each.run.mesh.pp == 1]
    if plain:
        assert mine.run.mesh.pp == 1
    calmest = min(map(network_s, plain or alike))
    assert network_s(mine) <= calmest + 0.01 * mine.time.step_s


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.startswith(TUTORIALS)])
def test_a_recipe_names_the_plainer_or_published_layout_as_options(name: str) -> None:
    machine, nodes = machine_of(name) or pytest.skip("it names no Trainium")
    found = re.search(
        r"(?:Plainer|Published): .*?planned at (\S+) tokens/s with (--[^(]*) \(([^)]*)\)",
        comment(name),
    )
    assert found
    options = found[2].split()
    plainer, mine = plan(name, machine, nodes, overrides=options), plan(name, machine, nodes)
    assert plainer.memory.fits
    assert (speed(plainer), show_bytes(plainer.memory.peak)) == (found[1], found[3])
    assert plainer.time.tokens_per_s < mine.time.tokens_per_s
    assert plainer.run.total_tokens == mine.run.total_tokens, "the training is the same"
    assert [
        option for option in options if option not in flags(mine.run.config, nodes, plainer)
    ] == []


def planned_comment(name: str) -> str | None:
    """What a recipe for Trainium says of its plan and of the search, or None without a machine."""
    found = machine_of(name)
    if found is None:
        return None
    config, (machine, nodes) = load_config(name), found
    as_it_is, (best, *others) = plan(config, machine, nodes), layouts(name)

    memory, whole = show_bytes(as_it_is.memory.peak), show_bytes(machine.memory_bytes())
    said = f"{speed(as_it_is)} tokens/s with {memory} of {whole} a rank; llamax plan --search finds"
    if changes := " ".join(flags(config, nodes, best)):
        said += f" {speed(best)} with {changes} ({show_bytes(best.memory.peak)})"
    else:
        said += " no faster layout"
    large = next(each for each in others if each.large or not each.memory.fits)
    if large.memory.fits and large.time.tokens_per_s * SLOWER > best.time.tokens_per_s:
        said += (
            f", and {speed(large)} for a compiler that takes a program of "
            f"{show_number(large.program)} instructions, with "
            f"{' '.join(flags(config, nodes, large))} ({show_bytes(large.memory.peak)})"
        )
    return f"{said}."


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_what_it_is_planned_at_and_what_would_be_faster(name: str) -> None:
    wanted = planned_comment(name)
    if wanted is None:
        pytest.skip("it names no Trainium")
    found = re.search(r" Plan: (.*?) [A-Z][a-z]+( \(.*?\))?: ", comment(name))
    assert found, f"add: {wanted}"
    assert found[1] == wanted
