"""Read a folder of files of one sample each, as quantification tools write them."""
