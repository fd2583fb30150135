"""AVSBench-Semantic, as its users have it on disk."""

dataset = {
    split: dict(
        type="AVSSDataset",
        split=split,
        num_classes=71,
        num_frames=10,
        crop_img_and_mask=False,
        crop_size=224,
        meta_csv_path="data/AVSS/metadata.csv",
        label_idx_path="data/AVSS/label2idx.json",
        dir_base="data/AVSS",
        img_size=(224, 224),
        resize_pred_mask=False,
        save_pred_mask_img_size=(360, 240),
        batch_size=2,
    )
    for split in ("train", "val", "test")
}
