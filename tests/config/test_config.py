"""What a YAML may say, and what it gets for what it may not."""

import pytest
from conftest import ROOT

import cli
import train
from cli import pick_config
from config import config_differences, load_config, parse_config
from config.schema import NEEDS
from model.models import build_denoiser
from support.errors import UserError


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/**/*.yaml")), ids=lambda p: p.stem)
def test_every_yaml_loads_and_builds(path):
    config = load_config(path)
    if config.net_type == "diffusers":
        with pytest.raises(UserError, match="such a network is read, with --ckpt"):
            build_denoiser(config)
        return
    assert config.linear.blockname in build_denoiser(config).block_names


def test_a_yaml_of_the_reference_loads(tmp_path):
    """The keys and value forms of FutureXiang/ddae."""
    path = tmp_path / "ddae.yaml"
    path.write_text(
        "model_type: 'DDPM'\nnet_type: 'UNet'\ndiffusion:\n  n_T: 1000\n  betas: [1.0e-4, 0.02]\n"
        "network:\n  image_shape: [3, 32, 32]\n  n_channels: 128\n  ch_mults: [1, 2, 2, 2]\n"
        "  is_attn: [False, True, False, False]\n  dropout: 0.1\n  n_blocks: 2\n"
        "  use_res_for_updown: False\nn_epoch: 2000\nbatch_size: 128\nlrate: 1.0e-4\n"
        "warm_epoch: 13\nload_epoch: -1\nflip: True\nema: 0.9999\nn_sample: 30\n"
        "save_dir: './output_DDPM_ddpm'\nsave_model: True\nlinear:\n  n_epoch: 15\n"
        "  batch_size: 128\n  lrate: 1.0e-3\n  timestep: 11\n  blockname: 'out_6'\n"
    )
    config = load_config(path)
    assert config.network.n_channels == 128
    assert config.linear.blockname == "out_6"
    parameters = sum(p.numel() for p in build_denoiser(config).parameters())
    assert parameters == 35_746_307  # the paper's DDPM network


def test_numbers_that_pyyaml_reads_as_text(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("lrate: 1e-4\ndiffusion: {betas: [1e-4, 2e-2]}\n")
    config = load_config(path, ["linear.lrate=1e-2", "warm_epoch=0"])
    assert config.lrate == 1e-4
    assert config.diffusion.betas == (1e-4, 2e-2)
    assert config.linear.lrate == 1e-2
    assert config.warm_epoch == 0


def test_overrides_leave_the_rest_of_a_section(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("linear: {timestep: 11, n_epoch: 3}\n")
    config = load_config(path, ["linear.timestep=21"])
    assert (config.linear.timestep, config.linear.n_epoch) == (21, 3)


BOMB = "\n".join(
    ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
)


@pytest.mark.parametrize(("text", "message"), [
    ("lrate: [", "not valid YAML"),
    ("- a\n- b", "expected 'key: value'"),
    ("batchsize: 64", "unknown key 'batchsize': did you mean 'batch_size'?"),
    ("linear: {timestemp: 3}", "unknown key 'linear.timestemp': did you mean 'timestep'?"),
    ("zzz: 1", "unknown key 'zzz': known here: dataset"),
    ("n_epoch: many", "n_epoch: .*'many'"),
    ("batch_size: 0", "batch_size: .*greater than 0"),
    ("lrate: -1e-4", "lrate: .*greater than 0"),
    ("network: {ch_mults: [1, 2]}", "ch_mults has 2 entries and is_attn 4"),
    ("network: {image_shape: [3, 30, 32]}", "30x32 cannot be halved 3 times"),
    ("network: {n_channels: 48}", "48 is not divisible by the 32 groups"),
    ("network: {attn_channels_per_head: 48}", "48 does not divide"),
    ("diffusion: {betas: [0.02, 1e-4]}", "betas must satisfy"),
    ("model_type: GAN", "model_type: no 'GAN': there are DDPM, EDM"),
    ("network: 3", "network: .*3"),
    (f"save_dir: {'x' * 300}", "save_dir: too long: a name takes 255 bytes"),
    (f"save_dir: {'x/' * 3000}", "save_dir: too long"),
    (f"n_epoch: [{'1, ' * 5000}1]", r"n_epoch: .*\(found \[1, 1.{1,60}\)"),
    (f"n_epoch: {'x' * 5000}", r"n_epoch: .*\(found 'xxx.{1,60}\)"),
    (BOMB, "not valid YAML: its aliases make more than 10,000 values"),
    ("a: &a [*a]", "not valid YAML: its aliases make more than"),
    ("a: " + "[" * 3000 + "]" * 3000, "not valid YAML: nested too deeply"),
])  # fmt: skip
def test_mistakes_are_named_with_the_file(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("override", "message"), [
    ("lrate", "expected key=value"),
    ("linear.timestemp=1", "did you mean 'timestep'"),
    ("lrate=[", "--set lrate="),
    ("n_epoch.x=1", "n_epoch is a value"),
])  # fmt: skip
def test_mistakes_in_overrides(tmp_path, override, message):
    path = tmp_path / "a.yaml"
    path.write_text("n_epoch: 3")
    with pytest.raises(UserError, match=message):
        load_config(path, [override])


def test_a_config_that_is_not_there():
    with pytest.raises(UserError, match=r"no such config.*DDPM_ddpm\.yaml"):
        load_config("config/DDPM_ddmp.yaml")


def test_differences_name_the_nested_key():
    a = parse_config({"lrate": 1e-3, "network": {"dropout": 0.2}})
    lines = config_differences(a, parse_config({}), ignore={"lrate"})
    assert lines == ["network.dropout: 0.2, not 0.1"]


def test_a_shorthand_is_the_same_as_its_set(tiny_yaml):
    short = train.parse_args([
        "--config", str(tiny_yaml), "--epochs", "7", "--lr", "1e-5", "--timesteps", "50",
        "--batch_size", "9", "--sample_every", "3", "--save_every", "4", "--output_dir", "there",
    ])  # fmt: skip
    sets = ("n_epoch=7", "lrate=1e-5", "diffusion.n_T=50", "batch_size=9", "sample_every=3",
            "save_every=4", "save_dir=there")  # fmt: skip
    long = train.parse_args(["--config", str(tiny_yaml)] + [f"--set={text}" for text in sets])
    assert pick_config(short) == pick_config(long)
    assert pick_config(short).lrate == 1e-5


@pytest.mark.parametrize(("name", "file"), [("mnist", "mnist.yaml"), ("cifar", "DDPM_ddpm.yaml")])
def test_a_dataset_names_its_config(name, file):
    args = train.parse_args(["--dataset", name])
    assert pick_config(args) == load_config(f"config/{file}")


def test_a_dataset_without_a_config_and_two_configs_are_refused(tiny_yaml, monkeypatch):
    with pytest.raises(UserError, match="did you mean 'mnist'"):
        pick_config(train.parse_args(["--dataset", "mnits"]))
    monkeypatch.setattr(cli, "__file__", str(tiny_yaml))  # beside which there is no config/
    with pytest.raises(UserError, match="no config for it"):
        pick_config(train.parse_args(["--dataset", "cifar100"]))
    with pytest.raises(UserError, match="exclude each other"):
        pick_config(train.parse_args(["--dataset", "mnist", "--config", str(tiny_yaml)]))


@pytest.mark.parametrize(("setting", "needs"), [
    ("distill.weight=0.03", "distill.loss=infonce"), ("distill.queue=8", "distill.loss=infonce"),
    ("distill.tau=1", "distill.loss=dispersive"), ("decay_from=0.5", "lr_decay=linear"),
    ("diffusion.gamma=3", "diffusion.weighting=min_snr"),
    ("diffusion.p_mean=-2", "diffusion.time=lognormal"),
    ("diffusion.betas=[1e-4,0.03]", "diffusion.schedule=scaled_linear"),
])  # fmt: skip
def test_a_setting_that_changes_nothing_is_refused(tmp_path, setting, needs):
    path = tmp_path / "some.yaml"
    path.write_text("diffusion: {schedule: cosine}\n")
    name, other = (text.partition("=")[0] for text in (setting, needs))
    with pytest.raises(UserError, match=f"{name}: changes nothing unless {other} is"):
        load_config(path, [setting])
    load_config(path, [setting, needs])
    parse_config(load_config(path, [setting, needs]).model_dump())


def test_edm_has_no_other_noise_than_log_normal():
    assert load_config("config/EDM_ddpm.yaml", ["diffusion.p_mean=-2"]).diffusion.p_mean == -2


def test_what_every_setting_needs_is_a_setting():
    config = parse_config({})
    for name, (other, values) in NEEDS.items():
        for value in values:
            parse_config({}, [f"{other}={value}"])
        section, _, field = name.rpartition(".")
        assert field in type(getattr(config, section) if section else config).model_fields
