"""AVSBench Single-source, as its users have it on disk."""

dataset = {
    split: dict(
        type="S4Dataset",
        split=split,
        anno_csv="data/Single-source/s4_meta_data.csv",
        dir_img="data/Single-source/s4_data/visual_frames",
        dir_audio_log_mel="data/Single-source/s4_data/audio_log_mel",
        dir_mask="data/Single-source/s4_data/gt_masks",
        img_size=(224, 224),
        batch_size=2,
    )
    for split in ("train", "val", "test")
}
