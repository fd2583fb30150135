"""AVSBench Multi-sources, as its users have it on disk."""

dataset = {
    split: dict(
        type="MS3Dataset",
        split=split,
        anno_csv="data/Multi-sources/ms3_meta_data.csv",
        dir_img="data/Multi-sources/ms3_data/visual_frames",
        dir_audio_log_mel="data/Multi-sources/ms3_data/audio_log_mel",
        dir_mask="data/Multi-sources/ms3_data/gt_masks",
        img_size=(224, 224),
        batch_size=2,
    )
    for split in ("train", "val", "test")
}
