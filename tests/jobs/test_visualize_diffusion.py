"""The forward process as shown: clean at 0, noise at the end, whatever the process."""

import pytest
import torch

import visualize_diffusion
from config.schema import DDPMDiffusion, EDMDiffusion
from evaluation.samples.grids import load_png
from model.DDPM import DDPM
from model.EDM import EDM


@pytest.mark.parametrize("process", [
    DDPM(torch.nn.Linear(1, 1), DDPMDiffusion()), EDM(torch.nn.Linear(1, 1), EDMDiffusion()),
])  # fmt: skip
def test_t_0_is_the_image_and_the_last_t_is_noise(process):
    x0 = torch.rand(4, 3, 16, 16) * 2 - 1
    shown = visualize_diffusion.noisy(process, x0, [0, 1, process.n_T], seed=0)
    assert torch.equal(shown[:, 0], x0)
    torch.testing.assert_close(shown[:, 1], x0, rtol=0, atol=0.1)
    last = shown[:, 2]
    assert last.std().item() == pytest.approx(1, abs=0.1)
    correlation = torch.corrcoef(torch.stack([last.flatten(), x0.flatten()]))[0, 1]
    assert abs(correlation) < 0.1


def test_the_job_writes_a_picture(tiny_yaml, tmp_path, capsys):
    path = tmp_path / "picture.png"
    assert visualize_diffusion.main([
        "--config", str(tiny_yaml), "--num_images", "2", "--timesteps", "0,500",
        "--save_path", str(path),
    ]) == 0  # fmt: skip
    assert str(path) in capsys.readouterr().out
    assert load_png(path).float().std() > 10


@pytest.mark.parametrize("wrong", [("--timesteps", "0,1001"), ("--num_images", "0")])
def test_what_is_not_there_is_refused(tiny_yaml, mistake, wrong):
    with mistake(wrong[0]):
        visualize_diffusion.main(["--config", str(tiny_yaml), *wrong])
