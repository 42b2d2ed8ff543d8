"""Train gates in several processes, on handwritten digits.

    torchrun --nproc-per-node 2 examples/distributed.py --strategy ddp
    torchrun --nproc-per-node 2 examples/distributed.py --strategy fsdp

A small network is trained, then trained further with gates, with each process on its part of the data. "ddp" uses
DistributedDataParallel, with the whole model in each process; "fsdp" uses FSDP2, with a part of every kernel in each
process. The gates are the same in all processes. At the end the first process removes the dead channels and saves the
model.
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import autogate
from autogate import digits


def plain() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", in_chans=1, num_classes=10)


def prepared(model: nn.Module, steps: int) -> nn.Module:
    """Add gates. This comes before wrapping and sharding."""
    return autogate.prepare(model, torch.randn(2, 1, digits.SIZE, digits.SIZE), flops=0.5, steps=steps)


def distributed(model: nn.Module, strategy: str) -> nn.Module:
    """Wrap or shard the model for training."""
    if strategy == "ddp":
        return DistributedDataParallel(model)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        fully_shard(stage)
    return fully_shard(model)


def gathered(model: nn.Module, steps: int) -> nn.Module | None:
    """Gather a sharded model, with its gates, into a plain one on the first process. All processes must call this."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return None
    whole = prepared(plain(), steps)
    whole.load_state_dict(state)
    return whole


def train(model: nn.Module, loader: DataLoader, epochs: int, device: torch.device, peak: float) -> None:
    """A plain training loop, which knows nothing of gates."""
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, epochs * len(loader))
    model.train()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, split: digits.Split) -> float:
    """Accuracy in percent."""
    return 100 * (model.eval()(split.images).argmax(1) == split.labels).float().mean().item()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp")
    arguments.add_argument("--epochs", type=int, default=6, help="number of epochs before prepare, and again after it")
    arguments.add_argument("--batch", type=int, default=32, help="images per process and step")
    arguments.add_argument("--save", help="file for the slim model (.pt)")
    options = arguments.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    training, testing = digits.load()
    data = TensorDataset(training.images, training.labels)
    loader = DataLoader(data, options.batch, sampler=DistributedSampler(data))
    steps = options.epochs * len(loader)

    model = plain().to(device)
    train(DistributedDataParallel(model), loader, options.epochs, device, peak=0.05)
    model = distributed(prepared(model, steps), options.strategy)
    train(model, loader, options.epochs, device, peak=0.02)
    whole = gathered(model, steps) if options.strategy == "fsdp" else model.module.cpu()
    if dist.get_rank() == 0:
        before = accuracy(whole, testing)
        print(autogate.summary(whole))
        slim = autogate.finalize(whole)
        print(f"{options.strategy}: accuracy {before:.2f} % gated, {accuracy(slim, testing):.2f} % slim")
        if options.save:
            torch.save(slim, options.save)
    dist.barrier()  # no process leaves while another one is working
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
