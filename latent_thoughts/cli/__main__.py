from latent_thoughts.cli import main

if __name__ == "__main__":
    main()
