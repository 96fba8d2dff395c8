"""What sample.py writes."""

import numpy as np
import pytest

import tx_jax as tx


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


def test_a_text_stops_before_the_first_stop_string(write):
    """Whole or streamed, and each sample at its own place; a stop string that never comes changes nothing."""
    flags = ("--prompt", "the", "--seed", "3")
    whole = write(*flags, n=40)
    stop = next(whole[i : i + 2] for i in range(10, 40) if whole.index(whole[i : i + 2], 2) == i)
    for streamed in ([], ["--stream"]):
        assert write(*flags, "--stop", stop, "zzz", *streamed, n=40) == whole[: whole.index(stop, 3)] + "\n"
        assert write(*flags, "--stop", "zzz", *streamed, n=40) == whole
    many = (*flags, "--num-samples", "3")
    _, *free = write(*many, n=40).split("--- sample ")
    _, *stopped = write(*many, "--stop", " ", n=40).split("--- sample ")
    assert [text[:5] + text[5:-1].split(" ")[0] + "\n" for text in free] == stopped


def test_a_text_matches_the_expression(write):
    """Whole or streamed, and each sample for itself; it ends where nothing more could match."""
    pytest.importorskip("outlines_core")
    flags = ("--prompt", "the ", "--regex", "(cat|mat)( sat){2}", "--seed", "3")
    whole = write(*flags, n=40)
    assert whole in ("the cat sat sat\n", "the mat sat sat\n")
    assert write(*flags, "--stream", n=40) == whole
    _, *many = write(*flags, "--num-samples", "9", n=40).split("--- sample ")
    assert {text[2:] for text in many} == {"the cat sat sat\n", "the mat sat sat\n"}
    assert write(*flags, n=5) == whole[:9] + "\n"  # cut


def test_penalties_change_the_text_and_their_neutral_numbers_do_not(write):
    greedy = write("--temperature", "0", n=40)
    neutral = ("--repetition-penalty", "1", "--presence-penalty", "0", "--no-repeat-ngram", "0")
    assert write("--temperature", "0", *neutral, n=40) == greedy
    free_of_repeats = write("--temperature", "0", "--no-repeat-ngram", "4", "--prompt", "the", n=40)[:-1]
    grams = [free_of_repeats[i : i + 4] for i in range(len(free_of_repeats) - 3)]
    assert len(grams) == len({*grams})
    assert write("--temperature", "0", "--repetition-penalty", "5", n=40) != greedy
    assert write("--typical-p", "0.2") != write()
    assert write("--epsilon-cutoff", "0.9") == write("--temperature", "0")


def test_perplexity_is_that_of_the_text(run, sample, capsys, text):
    model = tx.load_pretrained(run)
    ids = tx.load_tokenizer(run).encode(text.read_text())[:300]
    (text.parent / "part.txt").write_text(tx.load_tokenizer(run).decode(ids))
    sample([str(run), "--perplexity", f"@{text.parent / 'part.txt'}"])
    found = tx.perplexity(tx.build(model.cfg), model.params, ids)
    bits = found.nats_per_token * 299 / np.log(2) / len(tx.load_tokenizer(run).decode(ids[1:]).encode())
    says = f"perplexity {found.perplexity:.4f} of 299 tokens, {found.nats_per_token:.4f} nats each, "
    says += f"{bits:.4f} bits per byte\n"
    assert capsys.readouterr().out == says
    assert 1 < found.perplexity < 15


@pytest.mark.parametrize("n", [1, 12])
def test_stream_writes_the_same_text(write, n):
    assert write("--seed", "3", "--stream", n=n) == write("--seed", "3", n=n)


def test_an_earlier_step(write):
    assert write("--step", "40") == write() != write("--step", "20")


def test_without_max_new_tokens_the_context_is_filled(run, sample, capsys):
    sample([str(run), "--prompt", "the cat"])
    assert len(capsys.readouterr().out) == 64 + 1


def test_weights_in_8_bits(run, write, sample, capsys):
    """Another perplexity than that of the weights themselves, and near it; they write in all ways."""

    def perplexity(*flags):
        sample([str(run), "--perplexity", "the cat sat on the mat", *flags])
        return float(capsys.readouterr().out.split()[1])

    exact, rounded = perplexity(), perplexity("--int8")
    assert exact != rounded == pytest.approx(exact, rel=0.05)
    assert write("--int8", "--seed", "1", "--stream") == write("--int8", "--seed", "1")


def test_a_text_that_is_cut_before_it_matches_says_so(sample, run, capsys):
    pytest.importorskip("outlines_core")
    for n, cut in ((3, True), (4, False)):
        for more in ((), ("--stream",)):
            sample([str(run), "--prompt", "the", "--regex", "cats", "--max-new-tokens", str(n), *more])
            out, err = capsys.readouterr()
            assert out == "the" + "cats"[:n] + "\n"
            assert ("cut after 3 tokens, before it matches; give more --max-new-tokens" in err.splitlines()) == cut
