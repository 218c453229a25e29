"""Settings: what composes, what is refused, and in which words."""

import dataclasses
import re
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from magnum_train import config
from magnum_train.config import TrainConfig, compose, differences, nearest_keys, setting_keys
from magnum_train.errors import ConfigError

EXPERIMENTS = sorted(path.stem for path in (config.CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name: str) -> None:
    settings = compose([f"experiment={name}", "tokenizer.path=vocabulary.json"])
    assert settings.model.transformer().n_layers > 0
    assert settings.packs_per_step > 0
    assert settings.data.sources


def test_the_12b_experiment_is_nemo() -> None:
    settings = compose(["experiment=magnum_v2_12b"])
    assert settings.model.weights == "mistralai/Mistral-Nemo-Base-2407"
    assert (settings.tokenizer.im_start_slot, settings.tokenizer.im_end_slot) == (14, 15)
    assert (settings.model.dim, settings.model.head_dim, settings.model.vocab_size) == (5120, 128, 131072)
    assert settings.packs_per_step == 128
    assert settings.train.epochs == 2
    assert list(settings.data.sources) == ["stheno", "opus_25k", "opus_3k", "writing_struct", "slim_orca"]
    assert settings.data.sources["slim_orca"].rows == 16000


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["experiment=magnum_v2_12b", "model.weights=null"], r"tokenizer\.path: found nothing.*\n.*or model\.weights"),
        (["model=from_weights"], r"model\.dim, .*, model\.rope_theta: found nothing.*\n.*or give model\.weights"),
        (["model.dim=null"], r"model\.dim: found nothing"),
        (["tokenizer.append=true"], r"tokenizer\.append: found true without model\.weights"),
        (["tokenizer.append=true", "tokenizer.im_end_slot=4", "model.weights=x"], r"found true, and a slot"),
    ],
)
def test_a_setting_left_open_or_at_odds_is_named(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(overrides).model.transformer()


def test_what_comes_out_is_frozen() -> None:
    settings = compose([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.optim.lr = 1.0  # type: ignore[misc]


def test_sources_are_a_map_by_name() -> None:
    settings = compose(["data.sources.facts.rows=100", "~data.sources.talk", "+data.sources.mine.path=my.jsonl"])
    assert sorted(settings.data.sources) == ["facts", "mine", "stories"]
    assert settings.data.sources["facts"].rows == 100


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optim.lrr", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("num_epochs", "train.epochs"),
        ("micro_batch_size", "train.tokens_per_step"),
        ("gradient_accumulation_steps", "train.tokens_per_step"),
        ("sequence_len", "data.pack_tokens"),
        ("output_dir", "run_dir"),
        ("train.learning_rate", "optim.lr"),
        ("checkpoint.every_step", "checkpoint.every_steps"),
        ("data.sources.facts.row", "data.sources.facts.rows"),
    ],
)
def test_an_unknown_key_is_answered_with_the_one_that_was_meant(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([f"{typed}=3"])
    assert caught.value.place == typed
    assert meant in caught.value.remedy


def test_an_unknown_key_in_a_file_is_refused_as_well(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sede"):
        compose(["+sede=4"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optim.lr=fast", "optim.lr"),
        ("train.epochs=two", "train.epochs"),
        ("optim.schedule=cosin", "optim.schedule"),
        ("optim.lr=0", "optim.lr"),
        ("optim.min_lr_ratio=2", "optim.min_lr_ratio"),
        ("train.loss_norm=mean", "train.loss_norm"),
        ("train.tokens_per_step=1000", "train.tokens_per_step"),
        ("data.pack_documents=0", "data.pack_documents"),
        ("precision=fp16", "precision"),
        ("experiment=dmo", "experiment"),
        ("experiment=null", "command line"),
        ("optim.lr=inf", "optim.lr"),
        ("train.max_grad_norm=nan", "train.max_grad_norm"),
        ("data.max_loss_share=7", "data.max_loss_share"),
        ("seed=-1", "seed"),
        ("profile.steps=3", "profile.steps"),
        ("data.sources.facts.rows=many", "data.sources.facts.rows"),
        ("+data.sources.mine=5", "data.sources.mine"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert caught.value.place == key
    assert "Traceback" not in str(caught.value)


def test_an_impossible_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.n_kv_heads: found 3; expected a divisor of n_heads = 4\.$"):
        compose(["model.n_kv_heads=3"]).model.transformer()


def test_every_alias_names_a_setting_that_exists() -> None:
    keys = set(setting_keys(TrainConfig))
    assert set(config._ALIASES.values()) <= keys


def test_every_setting_is_read_by_something() -> None:
    home = Path(config.__file__).parents[1]
    sources = [p for folder in ("magnum_train", "data", "model") for p in (home / folder).glob("*.py")]
    text = "\n".join(p.read_text() for p in sources)
    for key in setting_keys(TrainConfig):
        name = key.rsplit(".", 1)[-1]
        reads = re.findall(rf"\.{name}\b(?!\s*:)", text)
        assert reads, f"no code reads {key}"


def test_every_setting_has_its_reason() -> None:
    text = Path(config.__file__).read_text()
    for key in setting_keys(TrainConfig):
        if "NAME" in key or key in {
            f.name for f in dataclasses.fields(TrainConfig) if f.name not in ("run_dir", "seed")
        }:
            continue
        name = key.rsplit(".", 1)[-1]
        assert re.search(rf'^    {name}: .*\n    """', text, re.MULTILINE), f"{key} has no docstring"


def test_an_experiment_says_only_what_differs_from_its_base() -> None:
    base = config.flat(compose([]))
    for name in EXPERIMENTS:
        text = (config.CONF / "experiment" / f"{name}.yaml").read_text()
        settings = config.flat(compose([f"experiment={name}", "tokenizer.path=t.json"]))
        said = config.OmegaConf.to_container(config.OmegaConf.create(text))
        assert isinstance(said, dict)
        said.pop("defaults")
        for key in config.flat(said):
            if key in base and key != "tokenizer.path":
                assert settings[key] != base[key] or key == "train.tokens_per_step" or key == "optim.lr", key


def test_the_run_folder_follows_the_line() -> None:
    one, again, other = (
        config.default_run_dir("demo", ["experiment=demo", lr]) for lr in ("optim.lr=1", "optim.lr=1", "optim.lr=2")
    )
    assert one == again != other
    assert one.startswith("runs/demo-lr_1-")
    assert config.default_run_dir("demo", ["experiment=demo"]) == "runs/demo"
    assert config.default_run_dir("demo", ["a.lr=1", "seed=2"]) == config.default_run_dir("demo", ["seed=2", "a.lr=1"])
    assert config.default_run_dir("demo", ["a.x=1"]) != config.default_run_dir("demo", ["b.x=1"])


def test_a_recorded_configuration_reads_back_equal(tmp_path: Path) -> None:
    settings = compose(["experiment=demo", "profile.steps=[3,4]"])
    (tmp_path / "config.yaml").write_text(config.to_yaml(settings))
    assert config.from_yaml(tmp_path / "config.yaml") == settings


def test_only_settings_that_change_the_numbers_hinder_a_resume() -> None:
    old = compose(["experiment=demo"])
    free = compose(["experiment=demo", "checkpoint.every_steps=7", "train.epochs=3", "data.sources.facts.path=x"])
    bound = compose(["experiment=demo", "optim.lr=1", "data.sources.facts.rows=5"])
    assert differences(old, free) == {}
    assert differences(old, bound) == {"optim.lr": (0.002, 1.0), "data.sources.facts.rows": (None, 5)}


def test_nearest_keys_says_nothing_rather_than_nonsense() -> None:
    assert nearest_keys("qqqqqq", TrainConfig) == []


def test_the_documentation_lists_what_may_change_on_resume() -> None:
    text = (Path(config.__file__).parents[1] / "docs" / "architecture.md").read_text()
    block = text.split("From `RESUMABLE`")[1].split("\n\n")[1]
    assert sorted(block.split()) == sorted(config.RESUMABLE)


def test_a_group_without_the_name_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"experiment: found 'dmo'; expected one of demo, magnum_v2_12b"):
        compose(["experiment=dmo"])


@pytest.mark.parametrize("schema", [config.TrainConfig, config.ChatConfig, config.ExportConfig])
def test_help_says_of_every_setting_what_it_means(schema: type) -> None:
    lines = config.help_text("magnum_train.verb", schema).splitlines()
    keys = list(config.setting_keys(schema))
    for key in (k for k in keys if not any(other.startswith(f"{k}.") for other in keys)):
        [at] = [i for i, line in enumerate(lines) if line.startswith(f"  {key}=")]
        assert lines[at + 1].startswith("      "), key
        assert len(lines[at + 1]) > 12, key


@pytest.mark.parametrize("word", ["runs/demo", "What is this", "{a"])
def test_a_word_that_is_no_setting_is_answered_in_plain_words(word: str) -> None:
    with pytest.raises(ConfigError, match=r"command line: found .*; expected settings as key=value"):
        compose([word])


def test_a_path_of_training_may_hold_what_a_shell_can_pass() -> None:
    assert compose(["model.weights=runs/a b (c)=d@5"]).model.weights == "runs/a b (c)=d@5"
    assert compose(["model.weights=null"]).model.weights is None
    assert compose(["model.weights=${run_dir}/x", "run_dir=runs/a"]).model.weights == "runs/a/x"


def test_a_default_folder_can_be_typed_back_as_weights() -> None:
    name = config.default_run_dir("demo", ["optim.lr=2e-3", "+data.sources.a={path: x, rows: 5}"])
    assert re.fullmatch(r"runs/[A-Za-z0-9._+-]+", name)


def composed(*line: str) -> config.ChatConfig:
    """Chat's settings from a command line, through Hydra."""
    config.register()
    with config.hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        return config._frozen(config.ChatConfig, config.hydra.compose("chat", overrides=config._overrides(list(line))))


TEXTS = [
    *(
        "It's 1=1 (really)!",
        "Hello, how are you?",
        'She said "no"',
        "back\\slash",
        "\\'",
        "end\\",
        "${oops} $x",
        "a: b",
    ),
    *(
        "[1]",
        "null",
        "???",
        "",
        " ",
        "'quoted'",
        '"quoted"',
        "'",
        "# 1",
        "a\nb\n",
        "\\${x}",
        "\\\\${x}\\",
        "'${'",
        "{a: 1}",
        "~",
    ),
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_may_be_any_text(text: str) -> None:
    chat = composed("weights=runs/a=b,c", f"prompt={text}", f"system={text}")
    assert (chat.prompt, chat.system, chat.weights) == (text, text, "runs/a=b,c")


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
    | st.text(st.sampled_from("\\'\"${}=,#?[]:~ \nnul"), max_size=12)
)
def test_whatever_a_shell_can_pass_arrives_as_it_was_typed(text: str) -> None:
    """A shell passes anything but the zero character."""
    path = f"x{text}x"  # not in quotes of its own
    chat = composed(f"weights={path}", f"prompt={text}", f"system={text}")
    assert (chat.weights, chat.prompt, chat.system) == (path, text, text)


def test_a_path_may_be_null_or_quoted() -> None:
    chat = composed("weights='runs/a,b'", "prompts=null", 'prompt_file="my file"')
    assert (chat.weights, chat.prompts, chat.prompt_file) == ("runs/a,b", None, "my file")


@pytest.mark.parametrize(
    ("word", "place"), [("prompt=\udcff", "prompt"), ("\udcff=1", "command line"), ("\udcff", "command line")]
)
def test_bytes_that_are_no_text_are_refused_by_name(word: str, place: str) -> None:
    with pytest.raises(ConfigError, match=f"^{place}: found bytes that are not UTF-8"):
        composed("weights=w", word)


@pytest.mark.parametrize(
    ("line", "place"),
    [
        (["prompt=a", "prompts=b"], "prompt"),
        (["prompt_file=a", "prompts=b"], "prompt_file"),
        (["prompts=b", "system=c"], "system"),
        (["dtype=float16"], "dtype"),
        (["repetition_penalty=0"], "repetition_penalty"),
        (["temperature=-1"], "temperature"),
    ],
)
def test_settings_of_a_chat_that_do_not_go_together_are_refused(line: list[str], place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed("weights=w", *line)
    assert caught.value.place == place
