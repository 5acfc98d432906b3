"""Tokens are in no file, log, card or error, whatever a run does and wherever it fails."""

import logging

import pytest

from trl_bilevel.cli import main
from trl_bilevel.hub_errors import PublishError
from trl_bilevel.report import build_report


REPO = "me/mixture-curated"
TOKEN = "hf_write"  # that the loopback Hub knows
OTHERS = {"WANDB_API_KEY": "wandb-0123456789", "OPENAI_API_KEY": "sk-0123456789", "HF_TOKEN": TOKEN}
SECRETS = [secret.encode() for secret in {TOKEN, "hf_wrong_0123456789", *OTHERS.values()}]


def _check(where, content):
    for secret in SECRETS:
        assert secret not in content, f"{secret.decode()!r} is in {where}"


def test_tokens_are_nowhere(hub, make_trainer, tmp_path, monkeypatch, caplog, capfd):
    for name, value in OTHERS.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.DEBUG, logger="trl_bilevel")
    trainer = make_trainer(
        hub_token=TOKEN, save_strategy="steps", save_steps=3, max_steps=6, refine_ratio=0.5, refine_start_step=0,
        refine_every_steps=2, refine_max_new_tokens=4, refine_discard_flawed=False,
    )  # fmt: skip
    folder = tmp_path / "run"
    trainer.train()
    trainer.save_model()
    with pytest.raises(PublishError) as refused:
        trainer.push_curated_dataset(REPO, keep_ratio=0.5, token="hf_wrong_0123456789")
    trainer.push_curated_dataset(REPO, keep_ratio=0.5)
    trainer.push_to_hub()
    (folder / "report.html").write_text(build_report(folder))
    main(["curate", str(folder), "--output_dir", str(tmp_path / "curated")])
    main(["push", str(folder), REPO, "--keep_ratio", "0.25"])

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"training_args.bin", "trainer_state.json", "_run.json", "report.html"}
    assert (folder / "checkpoint-3" / "training_args.bin").is_file()
    for path in files:
        _check(path, path.read_bytes())
    for kind, repo in (("dataset", REPO), ("model", "me/run")):
        for name, content in hub.files(kind, repo).items():
            _check(f"{repo}/{name}", content)
    _check("the error", str(refused.value).encode())
    _check("the log", caplog.text.encode())
    printed = capfd.readouterr()
    _check("what is printed", (printed.out + printed.err).encode())


@pytest.mark.parametrize(
    "repo_id",
    ["", " ", ".", "..", "../rows", "/etc/passwd", "me/../you", "me//rows", "me/rows/more", "me/rows.git", "me/-rows",
     "me/" + "x" * 97, "me/ro ws", "me/rows\n", "me/rows\x00", "me/r\u00f6ws", "me/rows?a=b", "me/rows#1", "me\\rows",
     "https://me/rows", "me/rows;rm -rf"],
)  # fmt: skip
def test_what_cannot_be_a_repository_is_refused_before_anything_is_sent(hub, make_trainer, repo_id):
    trainer = make_trainer()
    requests = len(hub.requests)
    with pytest.raises(ValueError, match="cannot be a repository's name"):
        trainer.push_curated_dataset(repo_id)
    assert len(hub.requests) == requests
