"""What a call of `medsynth sample` asks for, and the folder of pictures that it keeps."""
