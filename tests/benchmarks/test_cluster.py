"""benchmarks/lib/cluster.py: the computed time of a step follows from its parts; docs/scale.md shows it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402
from lib import cluster  # noqa: E402
from lib.paper_models import PAPER_MODELS  # noqa: E402

from grpo import config as configuration  # noqa: E402
from grpo.model.decoder import ModelConfig  # noqa: E402
from grpo.run import estimate  # noqa: E402

CONFIG = configuration.parse(["--preset", "paper_countdown", "--device", "cuda", "--dtype", "bfloat16"])
SMALL, LARGE = (ModelConfig.from_hf(PAPER_MODELS[name]) for name in scaling.COMPUTED_MODELS)


def test_a_collective_moves_all_but_a_rank_s_share_and_crosses_the_network_once():
    here = 1e9 * 7 / 8 / (cluster.NVLINK * cluster.COPIES)
    assert cluster.collective(1e9, 8) == pytest.approx(here + 8 * cluster.HOP)
    between = 1e9 / 8 / 2 / (cluster.NETWORK * cluster.COPIES)  # half of it is on the other machine
    assert cluster.collective(1e9, 16) == pytest.approx(here + between + 16 * cluster.HOP)


def test_the_update_divides_by_the_ranks_until_each_has_a_group():
    updates = {ranks: cluster.step_time(CONFIG, SMALL, ranks).update for ranks in (1, 8, 32, 64)}
    work = estimate.step(CONFIG, SMALL)
    assert updates[1] == pytest.approx(work.update_flops / (cluster.FLOPS * cluster.PRODUCTS))
    assert updates[8] == pytest.approx(updates[1] / 8) and updates[32] == pytest.approx(updates[1] / 32)
    assert updates[64] == updates[32]
    assert [cluster.step_time(CONFIG, SMALL, ranks).busy for ranks in (8, 64)] == [8, 32]


def test_a_rollout_reads_the_weights_at_every_token():
    steps = CONFIG.max_reflection_length + CONFIG.max_completion_length
    weights = 2 * estimate.parameters(LARGE) / (cluster.MEMORY * cluster.COPIES)
    assert cluster.step_time(CONFIG, LARGE, 1024).rollout > steps * weights


def test_one_rank_exchanges_nothing_and_reads_no_episodes():
    alone, two = (cluster.step_time(CONFIG, SMALL, ranks) for ranks in (1, 2))
    assert alone.host == 0 < two.host
    adamw = 28 * estimate.parameters(SMALL) / (cluster.MEMORY * cluster.COPIES)
    assert alone.exchange == pytest.approx(adamw)
    doubled = cluster.step_time(replace(CONFIG, groups_per_step=64), SMALL, 2)
    assert doubled.host == pytest.approx(2 * two.host)
    assert alone.step == alone.rollout + alone.update + alone.exchange


def test_the_page_about_scale_shows_the_tables(capsys):
    assert scaling.main(["--computed"]) == 0
    assert (printed := capsys.readouterr().out.strip()).count("computed") == 4
    assert printed in (ROOT / "docs/scale.md").read_text(encoding="utf-8")
