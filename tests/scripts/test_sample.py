"""What sample.py writes."""

import pytest


@pytest.fixture
def write(run, sample, capsys):
    """The text that sample.py writes, by its flags."""

    def written(*flags, n=12):
        capsys.readouterr()
        sample([str(run), "--max-new-tokens", str(n), *flags])
        return capsys.readouterr().out

    return written


def test_prompt_as_text_file_and_standard_input(run, write, child, tmp_path):
    (tmp_path / "prompt.txt").write_text("the cat")
    by_text = write("--prompt", "the cat")
    assert by_text.startswith("the cat")
    assert len(by_text) == len("the cat") + 12 + 1
    assert write("--prompt", f"@{tmp_path / 'prompt.txt'}") == by_text
    process = child("sample.py", run, "--max-new-tokens", 12, "--prompt", "-")
    out, err = process.communicate("the cat", timeout=100)
    assert (process.returncode, out) == (0, by_text)
    assert [line.split(",")[0] for line in err.splitlines()] == ["prefill 7 tokens", "decode 12 tokens"]


def test_seed_decides(write):
    assert write("--seed", "1") == write("--seed", "1") != write("--seed", "2")


def test_temperature_0_is_greedy_and_so_are_the_narrowest_samplers(write):
    greedy = write("--temperature", "0")
    for flags in (["--temperature", "0"], ["--top-k", "1"], ["--top-p", "1e-6"], ["--min-p", "1"]):
        assert write(*flags, "--seed", "5") == greedy


def test_the_widest_samplers_change_nothing(write):
    assert write("--top-k", "999", "--top-p", "1", "--min-p", "0") == write()


def test_num_samples(write):
    _, *samples = write("--num-samples", "3", "--prompt", "the").split("--- sample ")
    assert [text[:5] for text in samples] == ["1\nthe", "2\nthe", "3\nthe"]
    assert len({text[1:] for text in samples}) == 3


@pytest.mark.parametrize("n", [1, 12])
def test_stream_writes_the_same_text(write, n):
    assert write("--seed", "3", "--stream", n=n) == write("--seed", "3", n=n)


def test_an_earlier_step(write):
    assert write("--step", "40") == write() != write("--step", "20")


def test_without_max_new_tokens_the_context_is_filled(run, sample, capsys):
    sample([str(run), "--prompt", "the cat"])
    assert len(capsys.readouterr().out) == 64 + 1
