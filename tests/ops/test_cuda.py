"""What can be checked of the CUDA kernels without a GPU: that nvcc takes them, and that their thread mapping covers
every pair of head and query once. The kernels' results are tested in test_parity.py where there is a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).parents[2] / "ops" / "src"

MAPPING = r"""
#include <cstdio>
#include <map>
#include <vector>
#include "cuda_mapping.h"

// Runs the grid as the kernels do, and counts the visits of each (pair, channel).
static bool covers(int64_t pairs, int channels, int vec, unsigned grid) {
  const modat::Mapping map(pairs, channels, vec, 256);
  if (grid == 0) grid = map.blocks();
  std::vector<int> visits(pairs * channels);
  for (unsigned block = 0; block < grid; ++block) {
    std::map<std::pair<int, unsigned>, std::vector<int64_t>> groups;  // (warp, mask) -> pairs of its lanes
    for (unsigned thread = 0; thread < 256; ++thread) {
      if (!(map.mask(thread) >> (thread % 32) & 1)) return false;
      if (__builtin_popcount(map.mask(thread)) != map.group) return false;
      // Shuffles number the lanes of a group from its first: lane 0 must be that one.
      if (__builtin_ctz(map.mask(thread)) + map.lane(thread) != int(thread % 32)) return false;
      groups[{int(thread / 32), map.mask(thread)}].push_back(map.pair(block, thread));
      for (int64_t pair = map.pair(block, thread); pair < pairs; pair += map.stride(grid)) {
        for (int first = 0; first < channels; first += map.group * vec) {
          const int channel = first + map.lane(thread) * vec;
          for (int v = 0; channel < channels && v < vec; ++v) ++visits[pair * channels + channel + v];
        }
      }
    }
    for (const auto& group : groups)
      for (int64_t pair : group.second)
        if (pair != group.second[0]) return false;  // a group with two pairs would shuffle between them
  }
  for (int count : visits)
    if (count != 1) return false;
  return true;
}

int main() {
  for (int vec : {1, 2, 4, 8})
    for (int channels : {1, 2, 4, 8, 24, 32, 40, 64, 96, 128, 256, 264})
      for (int64_t pairs : {1, 7, 63, 64, 65, 1000})
        for (unsigned grid : {0u, 1u, 3u})
          if (channels % vec == 0 && !covers(pairs, channels, vec, grid)) {
            std::printf("pairs %ld channels %d vec %d grid %u\n", long(pairs), channels, vec, grid);
            return 1;
          }
  std::puts("covered");
  return 0;
}
"""


def test_every_pair_and_channel_has_one_thread_and_every_group_one_pair(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "mapping.cpp").write_text(MAPPING)
    command = [compiler, "-std=c++17", "-O1", f"-I{SOURCES}", "mapping.cpp", "-o", "mapping"]
    subprocess.run(command, cwd=tmp_path, check=True)
    result = subprocess.run([tmp_path / "mapping"], capture_output=True, text=True)
    assert result.stdout == "covered\n"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_compiles_the_kernels(tmp_path):
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("75", "90")]
    command = ["nvcc", "-std=c++17", "-O1", *targets, "-gencode=arch=compute_90,code=compute_90", "--threads=0"]
    result = subprocess.run(
        [*command, "-c", str(SOURCES / "cuda_kernels.cu"), "-o", str(tmp_path / "kernels.o")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "error" not in result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_deterministic_backward_repeats_its_bits():
    from ops import ms_deform_attn_fused

    torch.manual_seed(0)
    tensors = [
        tensor.cuda() for tensor in (torch.randn(2, 20, 4, 32), torch.rand(90, 2), torch.randn(2, 90, 4, 2, 4, 2))
    ]
    logits = torch.randn(2, 90, 4, 2, 4, device="cuda")
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            value = tensors[0].clone().requires_grad_()
            ms_deform_attn_fused(value, ((4, 4), (2, 2)), *tensors[1:], logits, backend="cuda").sum().backward()
            results.append(value.grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])
    value = tensors[0].clone().requires_grad_()
    ms_deform_attn_fused(value, ((4, 4), (2, 2)), *tensors[1:], logits, backend="torch").sum().backward()
    torch.testing.assert_close(results[0], value.grad, rtol=1e-4, atol=1e-5)
