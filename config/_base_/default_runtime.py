"""What a run uses and writes, whatever it learns: precision, seed, data workers, logging; all devices by default."""

process = dict(
    num_nodes=1,
    strategy="auto",
    precision="32",
    seed=0,
    deterministic=True,
    num_workers=8,
    work_dir="work_dir",
    log_interval=10,
    check_data=True,
    cache_features=True,
)
