"""A line that is no prompt is refused by its number, before any work."""

import pytest

BAD = {  # a line: what is wrong with it
    "{": "'{' is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); mend it",
    '{"prompt": NaN}': "'{\"prompt\": NaN}' is not JSON (Out of range float values are not JSON compliant",
    "[" * 9999: "is not JSON (maximum recursion depth exceeded",
    '["a"]': '[\'a\'] is no object; write one, such as {"prompt": "Once upon"}',
    '{"text": "a"}': 'it has no prompt but text; add one, such as {"prompt": "Once upon"}',
    "{}": "it has no prompt but nothing; add one",
    '{"prompt": "a", "messages": []}': "it has both a prompt and messages; leave one out",
    '{"prompt": ""}': "prompt='' must be a text of at least one character, or messages=[…] in its place",
    '{"prompt": ["a"]}': "prompt=['a'] must be a text of at least one character",
    '{"messages": "a"}': "messages='a' must be a text of at least one character, or messages=[…] in its place",
    '{"messages": [{}]}': "messages are for a model with a chat template, without --raw; give a prompt",
    '{"prompt": "a", "max_new_tokens": 0}': "max_new_tokens=0 must be a whole number, at least 1; or leave it out",
    '{"prompt": "a", "max_new_tokens": true}': "max_new_tokens=True must be a whole number, at least 1",
    '{"prompt": "a", "max_new_tokens": "9"}': "max_new_tokens='9' must be a whole number, at least 1",
    '{"prompt": "a", "log_prob": 1}': "it has a field ['log_prob'], which the output is to have; rename it",
    '{"prompt": "€"}': "character '€' at index 0 is not among the 15 of this tokenizer",
    f'{{"prompt": "{"a" * 64}"}}': "its prompt has 64 tokens and max_new_tokens=1, max_len=64; shorten one",
    '{"prompt": "a", "max_new_tokens": 64}': "its prompt has 1 tokens and max_new_tokens=64, max_len=64; shorten one",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_refused_before_any_work(job, tmp_path, line):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    says = job.refuses(input=bad)
    assert says.startswith(f"line 3 of {bad}: ")
    assert BAD[line] in says
    assert sorted(tmp_path.iterdir()) == [bad]


def test_a_bad_file_is_refused(job, tmp_path):
    (tmp_path / "empty").write_bytes(b"\n")
    rest = 'holds no prompt; write one a line, such as {"prompt": "Once upon"}'
    assert job.refuses(input=tmp_path / "empty") == f"input='{tmp_path / 'empty'}' {rest}"
    (tmp_path / "latin1").write_bytes('{"prompt": "é"}'.encode("latin1"))
    assert "is not JSON ('utf-8' codec can't decode byte 0xe9" in job.refuses(input=tmp_path / "latin1")
    says = f"input='{tmp_path / 'new'}' cannot be read (No such file or directory); name a file of lines of JSON"
    assert job.refuses(input=tmp_path / "new") == says
