"""A folder of your own: data/mine/clips.csv lists videos or frames, sounds and masks (dataloader/README.md)."""

dataset = {
    split: dict(
        type="FolderDataset",
        split=split,
        task="ms3",
        anno_csv="data/mine/clips.csv",
        img_size=(224, 224),
        batch_size=2,
    )
    for split in ("train", "val", "test")
}
