"""Photographs and recorded sounds of Debian's tuxpaint-stamps-default in the layout of AVSS, 128 pixels."""

stamps = dict(tasks=["avss"], out="data/stamps", size=128, kinds=12)
dataset = {
    split: dict(
        type="AVSSDataset",
        split=split,
        num_classes=71,
        num_frames=10,
        crop_img_and_mask=False,
        crop_size=128,
        meta_csv_path="data/stamps/AVSS/metadata.csv",
        label_idx_path="data/stamps/AVSS/label2idx.json",
        dir_base="data/stamps/AVSS",
        img_size=(128, 128),
        batch_size=2,
        flip=split == "train",
    )
    for split in ("train", "val", "test")
}
