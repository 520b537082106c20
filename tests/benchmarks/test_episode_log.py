"""benchmarks/episode_log.py: the forms contain the same episodes, and each is smaller than the one before."""

import sys
from pathlib import Path

import tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import episode_log  # noqa: E402

from grpo.episode import Episode  # noqa: E402
from grpo.run.files import read_jsonl  # noqa: E402


def test_synthetic_episodes_have_the_paper_s_sizes_and_shrink_to_a_sixth():
    tokenizer = tiny.byte_tokenizer()
    episodes = episode_log.paper(tokenizer, groups=2)
    assert [len(episode.prompt_ids) for episode in episodes] == [500] * 16
    assert [sum(episode.loss_mask("reflection")) for episode in episodes] == [256] * 16
    rows = episode_log.measure("paper", episodes, rounds=1)
    earlier, plain, compressed = (row["bytes each"] for row in rows)
    assert earlier > 20_000 and plain < 0.7 * earlier and compressed < earlier / 6


def test_the_earlier_form_and_the_present_one_contain_the_same_episodes(tmp_path):
    episodes = tiny.episodes(tiny.build())
    read = []
    for index, (form, name) in enumerate(episode_log.FORMS.items()):
        path = tmp_path / f"{index}-{name}"
        episode_log.write(path, episodes, form)
        read.append(list(map(Episode.from_json, read_jsonl(path))))
    assert read[0] == episodes and read[1] == read[2]
    assert [vars(episode) | {"logprobs": None} for episode in read[2]] == [
        vars(episode) | {"logprobs": None} for episode in episodes
    ]
