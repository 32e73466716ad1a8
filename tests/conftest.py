import torch

torch.set_num_threads(1)  # the models here are too small for more, and threads that spin slow down whatever runs beside


def pytest_configure(config):
    config.addinivalue_line("markers", "vllm: needs vLLM; .ci/vllm makes an environment with it")
