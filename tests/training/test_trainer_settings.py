"""Lightning's own settings are honoured, or refused by name: never silently ignored."""

import pytest
import yaml


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (("--trainer.default_root_dir", "somewhere"), "set run.dir"),
        (("--trainer.accumulate_grad_batches", "4"), "data.micro_batch_size"),
        (("--trainer.max_epochs", "3"), "trainer.max_steps"),
        (("--trainer.use_distributed_sampler", "true"), "divides blocks"),
        (("--trainer.fast_dev_run", "true"), "one step"),
        (("--trainer.limit_train_batches", "4"), "trainer.max_steps"),
        (("--trainer.limit_val_batches", "4"), "data.validation_blocks"),
        (("--trainer.overfit_batches", "2"), "data.max_tokens"),
        (("--trainer.profiler", "nonsense"), "it can only be one of"),
        (("--trainer.strategy", "nonsense"), "nonsense"),
        (("--trainer.logger", "{class_path: TensorBoardLogger, init_args: {save_dir: /tmp/x}}"), "tensorboard"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_done_is_refused_by_name(cli, tiny, tmp_path, setting, words):
    result = cli("fit", *tiny, *setting)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert all(line.startswith("error: ") for line in result.stderr.splitlines() if line.strip())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_all_of_them_are_named_at_once(cli, tiny):
    result = cli(
        "fit", *tiny, "--trainer.default_root_dir", "x", "--trainer.max_epochs", "3", "--trainer.max_steps", "0"
    )
    assert [line.split()[2] for line in result.stderr.splitlines()] == [
        "trainer.default_root_dir",
        "trainer.max_epochs",
        "trainer.max_steps",
    ]


SHORT = ["--trainer.max_steps", "4", "--model.placement_step", "1", "--run.sample_prompt", "null"]


def test_a_logger_of_the_recipe_writes_beside_the_run_s_own(cli, tiny, tmp_path):
    logger = f"{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}/mine, name: x}}}}"
    cli("fit", *tiny, *SHORT, "--trainer.logger", logger, "--trainer.log_every_n_steps", "2", check=0)
    for metrics in (tmp_path / "mine/x/version_0/metrics.csv", tmp_path / "run/csv/version_0/metrics.csv"):
        assert "train/loss" in metrics.read_text()


def test_loggers_progress_and_checkpoints_can_be_turned_off(cli, tiny, tmp_path):
    off = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing"]
    out = cli("fit", *tiny, *SHORT, *off, "false", check=0).stdout
    assert "tokens/s" not in out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "model" in names and not names & {"mlflow.db", "csv", "checkpoints"}


def test_print_config_prints_every_setting_and_does_nothing(cli, tiny, tmp_path):
    out = cli("fit", *tiny, "--model.learning_rate", "1e-4", "--print_config", check=0).stdout
    config = yaml.safe_load(out)
    assert config["model"]["init_args"]["learning_rate"] == 1e-4
    assert config["model"]["init_args"]["backbone"]["n_positions"] == 32  # interpolated
    assert config["data"]["num_workers"] == 0 and "gradient_clip_val" in config["trainer"]  # defaults
    assert not (tmp_path / "run").exists()
    (tmp_path / "again.yaml").write_text(out)
    for verb in ("fit", "index"):
        assert cli(verb, "--config", tmp_path / "again.yaml", "--print_config", check=0).stdout == out


def test_version_names_the_program(cli):
    import prism_lightning

    assert cli("--version", check=0).stdout == f"prism_lightning {prism_lightning.__version__}\n"
